"""Model cards of trained and imported models; test_shipped.py reads those of converted ones."""

from __future__ import annotations

from pathlib import Path

import yaml
from foreign_models import LLAMA, build, save

from sparsecli.interchange.importing import run
from sparsecli.model.card import CARD, Card, license_of


def front(card: str) -> dict[str, object]:
    return dict(yaml.safe_load(card.split("---")[1]))


def test_a_trained_model_s_card(finished: tuple[Path, object]) -> None:
    output, result = finished
    card = (output / "model" / CARD).read_text()
    assert front(card) == {
        "library_name": "sparsecli",
        "tags": ["sparsecli"],
        "pipeline_tag": "text-generation",
    }
    assert "sparsecli generate --model . --prompt" in card
    assert 'AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)' in card
    assert (
        str(output.parent) not in card.partition("## Recipe")[0]
    )  # a path on this machine says nothing to others
    assert f"| held-out loss | {result.held_out_loss:.4f} nats/token" in card
    assert "| training text | files: *.txt |" in card
    assert "| steps | 12 |" in card
    recipe = yaml.safe_load(card.split("```yaml")[1].split("```")[0])
    assert recipe["model"]["d_model"] == 16


def test_an_imported_model_s_card_names_source_and_license(tmp_path: Path) -> None:
    folder = save(build("llama", **LLAMA), tmp_path / "theirs")
    (Path(folder) / CARD).write_text("---\nlicense: apache-2.0\n---\n# Theirs\n")
    run(source=str(folder), output=tmp_path / "ours")
    card = (tmp_path / "ours" / CARD).read_text()
    assert front(card)["license"] == "apache-2.0" == license_of(tmp_path / "ours")
    assert "| architecture | LlamaForCausalLM |" in card
    assert "- License of the source: apache-2.0." in card


def test_licenses_that_cannot_be_read(tmp_path: Path) -> None:
    assert license_of(tmp_path) is None
    for text in ("no front matter", "---\n[1\n---", "---\n- a\n---", "---\nlicense: [a, b]\n---"):
        (tmp_path / CARD).write_text(text)
        assert license_of(tmp_path) is None
    Card("A model.", []).write(tmp_path, "mine")
    assert (tmp_path / CARD).read_text().count("# mine") == 1
