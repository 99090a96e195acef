"""The distribution `cpt-trainer`: the packages cpt, cpt_kernels and cpt_launcher, and the command `cpt`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="cpt-trainer",
    version=re.search(r'__version__ = "(.+?)"', (HERE / "cpt/__init__.py").read_text(encoding="utf-8")).group(1),
    description="Continual pre-training of large language models: learn the new, keep the old, and prove it",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",  # tested on 3.11 (all) and 3.10 (everything that needs no torch)
    # launcher/ and kernels/ are shelves: a package called `kernels` would stand in the way of the one on PyPI.
    packages=find_packages(include=["cpt", "cpt.*"]) + ["cpt_kernels", "cpt_launcher"],
    package_dir={"cpt_kernels": "kernels/cpt_kernels", "cpt_launcher": "launcher/cpt_launcher"},
    package_data={"cpt_launcher": ["templates/*"]},
    entry_points={"console_scripts": ["cpt=cpt.cli:main"]},
    install_requires=[
        "torch>=2.9",
        "deepspeed>=0.19.8,<0.20",  # cpt/parallel/weights.py reads its ZeRO optimisers; tests say when that changes
        "transformers>=5.0",
        "tokenizers>=0.22",
        "sentencepiece>=0.2",
        "safetensors>=0.5",
        "numpy>=1.26",
        "pyarrow>=15",
        "PyYAML>=6",
        "xxhash>=3",
        "protobuf>=4",  # sentencepiece's model format
        "tqdm>=4.64",
        "matplotlib>=3.7",
        "psutil>=5.9",
    ],
    extras_require={
        "fast": ["tiktoken>=0.14"],  # byte-level BPE tokenizers at several times the speed, the same ids
        "interop": ["megatron-core>=0.16"],  # tests that it and we read each other's shards
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.9",
            "zstandard>=0.22",
            "tiktoken>=0.14",
            "triton>=3.5; platform_system == 'Linux'",  # its interpreter and its compiler need no GPU
        ],
    },
)
