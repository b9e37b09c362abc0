"""Files that travel with the package: DeepSpeed configurations and SLURM templates."""

from __future__ import annotations

from pathlib import Path

from dist_train.errors import UserError

_PACKAGE = Path(__file__).parents[1]


def resource(folder: str, name: str) -> Path:
    """The file `name` of `ds_configs` or `slurm`: from the installed wheel, or from the checkout beside the package.

    Raises UserError naming what there is when there is no such file.
    """
    for root in (_PACKAGE / "_resources", _PACKAGE.parent):
        if (root / folder / name).exists():
            return root / folder / name
        if (root / folder).is_dir():
            known = ", ".join(
                sorted(file.stem for file in (root / folder).iterdir() if file.suffix == Path(name).suffix)
            )
    raise UserError(f"no {name} in {folder}; there are {known}")
