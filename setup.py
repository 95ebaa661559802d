"""The import package `gptoss` is src/; configs/ and assets/ travel inside it. The rest is in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

DATA = [folder for top in ("configs", "assets") for folder in (Path(top), *Path(top).rglob("*")) if folder.is_dir()]
data = {f"gptoss.{'.'.join(folder.parts)}": str(folder) for folder in DATA}

setup(
    packages=["gptoss", *(f"gptoss.{name}" for name in find_packages("src")), *data],
    package_dir={"gptoss": "src", **data},
    include_package_data=True,  # MANIFEST.in
)
