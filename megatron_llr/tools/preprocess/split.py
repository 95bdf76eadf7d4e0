"""A split of a dataset that leaves no part without documents."""

from megatron.core.datasets import blended_megatron_dataset_config as dataset_config

# Megatron's split without --split (megatron/training/arguments.py, legacy_default_split_value).
DEFAULT_SPLIT = "969,30,1"


def documents_per_part(split: str, documents: int) -> list[int]:
    """Documents of the training, validation and test parts.

    Args:
        split: as Megatron's --split.
        documents: number of documents of the dataset.

    Source: megatron/core/datasets/blended_megatron_dataset_builder.py,
    `_build_megatron_dataset_splits`.
    """
    shares = dataset_config.parse_and_normalize_split(split)
    ranges = dataset_config.convert_split_vector_to_split_matrix(shares)
    return [
        round(part[1] * documents) - round(part[0] * documents) if part else 0 for part in ranges
    ]


def split_flags(documents: int) -> tuple[str, str]:
    """Megatron's flags for the split, and a warning; both are empty if the default works.

    Megatron does not train if a part that has a share of the split has no documents.

    Args:
        documents: number of documents of the dataset.
    """
    if all(documents_per_part(DEFAULT_SPLIT, documents)):
        return "", ""
    if documents == 1:
        return "--split 100,0,0 --eval-iters 0", (
            "The dataset has one document, which cannot be split into training and validation "
            "data: the flags below train without validation. To get more documents from plain "
            "text, set --documents paragraph or line."
        )
    if documents == 2:
        split = "1,1,0"
    else:
        validation = max(1, round(0.03 * documents))
        split = f"{documents - validation - 1},{validation},1"
    return f"--split {split}", (
        f"The dataset has {documents} documents, too few for Megatron's default --split "
        f"{DEFAULT_SPLIT}, which would leave a part without documents: the flags below set another."
    )
