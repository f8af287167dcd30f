from pathlib import Path

from setuptools import find_packages, setup

VERSION = Path("stgfast/version.py").read_text(encoding="utf-8").split('__version__ = "')[1].split('"')[0]

RAY = ["ray>=2.50"]
TEST = ["pytest>=8", "pytest-benchmark>=4", "pytest-xdist>=3", "hypothesis>=6.100", "peft>=0.18", "selenium>=4.20"]
TEXT = ["ftfy>=6.1", "sentencepiece>=0.2", "protobuf>=4"]  # what pipelines ask for to read prompts, and do not bring
LINT = ["ruff>=0.9", "mypy>=1.14", "types-PyYAML", "types-tqdm"]

setup(
    name="stgfast",
    version=VERSION,
    description="Spatiotemporal Skip Guidance for diffusers video pipelines, at little more than the cost of CFG",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["stgfast", "stgfast.*"]),
    package_data={
        "stgfast": ["py.typed", "*/README.md", "*/*.html", "pages/common.*"],
        "stgfast.toy": ["*.safetensors", "pipeline/*", "pipeline/*/*"],
    },
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.6",
        "triton>=3.2; platform_system == 'Linux'",
        "diffusers>=0.40",
        "transformers>=5.12",
        "accelerate>=1.0",
        "numpy>=1.26",
        "av>=17",
        "pyyaml>=6",
        "pillow>=10",
        "tqdm>=4.60",
        *TEXT,
    ],
    extras_require={
        "flash-attn": ["flash-attn>=2.7"],
        "xformers": ["xformers>=0.0.29"],
        "ray": RAY,
        "test": TEST + RAY,
        "lint": LINT,
        "dev": TEST + RAY + LINT,
    },
    entry_points={"console_scripts": ["stgfast = stgfast.cli:main"]},
)
