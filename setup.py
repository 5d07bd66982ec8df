"Reads the package's metadata from settings.ini, the one place for it."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
parser = ConfigParser(interpolation=None)
parser.read(root / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]


def lines(key):
    return [line.strip() for line in settings[key].splitlines() if line.strip()]


def book():
    "The notebooks that `medssl-nb lab` copies, as data files a folder."
    notebooks = sorted(p.relative_to(root) for p in (root / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    folders = sorted({p.parent for p in notebooks})
    return [(f"share/medssl_nb/{folder}", [str(p) for p in notebooks if p.parent == folder]) for folder in folders]


setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(root / "README.md").read_text(encoding="utf-8") if (root / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    keywords=settings["keywords"].split(),
    license="Apache-2.0",
    license_files=["LICENSE"],
    url=f"https://github.com/{settings['user']}/{settings['repo']}",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Intended Audience :: Education",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
    packages=find_packages(include=["medssl_nb", "medssl_nb.*"]),
    data_files=book(),
    python_requires=f">={settings['min_python']}",
    install_requires=lines("requirements"),
    extras_require={"dev": lines("dev_requirements"), "faiss": lines("faiss_requirements")},
    entry_points={"console_scripts": lines("console_scripts")},
)
