"""A recorder of scalars with the interface of Megatron's writers."""


class Recorder:
    """Replaces Megatron's TensorBoard and W&B writers, with W&B's rules for steps.

    Attributes:
        rows: values in W&B by step. The last step is open; values of an earlier step are dropped.
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
