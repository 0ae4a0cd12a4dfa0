"""`laif sweep` at the command line: its help, and mistakes that are told at once."""

from pathlib import Path

import pytest

from laif_jax.cli.main import main

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")


def test_help(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["sweep", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--zip", "--one-by-one", "--together", "--json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dpo.betta=[0.1]"], "dpo.betta: unknown key; did you mean `beta`?"),
        (["dpo.beta=[0.1,x]"], "point `dpo.beta=x`:"),
        (["dpo.beta=0.1"], "give at least one axis"),
        (["seed"], "write it as key=value"),
        (["seed=[0,1]", "dpo.beta=[0.1,0.2,0.3]", "--zip"], "seed has 2, dpo.beta has 3"),
        (["seed=[0,1]", "--together", "0"], "--together 0: give a number of models"),
    ],
)
def test_a_mistake_is_one_message_and_status_2(arguments, message, capsys):
    assert main(["sweep", QUICKSTART, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("laif: ")
    assert message in captured.err


def test_one_by_one_and_together_exclude_each_other(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["sweep", QUICKSTART, "seed=[0,1]", "--one-by-one", "--together", "2"])
    assert caught.value.code == 2
    assert "not allowed with" in capsys.readouterr().err
