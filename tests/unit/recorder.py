"""A host's writer that keeps what it is given."""


class Recorder:
    """Stands for the host's writers, which have these methods; W&B's rules for steps hold.

    Attributes:
        rows: by step what W&B has, the last of them open; a step below it is dropped.
    """

    def __init__(self) -> None:
        self.scalars: dict[str, float] = {}
        self.rows: dict[int, dict[str, float]] = {0: {}}
        self.dropped: list[str] = []
        self.axes: dict[str, str | None] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars[tag] = value

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes[name] = step_metric

    def log(
        self, values: dict[str, float], step: int | None = None, commit: bool | None = None
    ) -> None:
        now = max(self.rows)
        if step is not None and step < now:
            self.dropped += values
            return
        stepped, step = step is not None, now if step is None else step
        self.rows.setdefault(step, {}).update(values)
        if commit or (commit is None and not stepped):
            self.rows[step + 1] = {}
