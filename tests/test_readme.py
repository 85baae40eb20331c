"""What the README shows works as it stands there."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_of_the_readme_runs(tmp_path: Path, tiny_folder: Path, tiny_encoder: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "photos")
    for number, path in enumerate(sorted((tmp_path / "photos").rglob("*.jpg"))):
        path.rename(path.with_stem(f"{path.parent.name}-{number}"))  # ids in the example are file names
    shutil.copytree(tiny_encoder, tmp_path / "runs" / "photos" / "encoder")
    [program] = blocks("python")
    out = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    first = out.stdout.splitlines()[0].split()
    assert float(first[0]) == pytest.approx(1, abs=1e-3)  # the picture itself comes first
    assert len(out.stdout.splitlines()) == 5


def test_every_command_of_the_readme_exists() -> None:
    verbs = {
        tuple(line.split()[:3])
        for block in blocks("sh")
        for line in block.splitlines()
        if line.startswith("dml ")
    }
    assert len(verbs) >= 6
    for _, verb, word in verbs:
        group = [verb, word] if verb in ("data", "index", "encoder", "list") else [verb]
        out = subprocess.run(
            [sys.executable, "-m", "dml.cli.main", *group, "--help"], cwd=ROOT, capture_output=True, text=True
        )
        assert out.returncode == 0, f"dml {' '.join(group)}: {out.stderr}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_every_link_and_picture_of_the_documents_leads_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", document.read_text()):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (document.parent / target).exists(), f"{document.name} points to {target}"
