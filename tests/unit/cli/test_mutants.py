"""The table of mutants: what a scenario sees, what breaks down, and what nobody notices."""

import json

from dfs.cli.check_cmd import _find_mutants


class Scenario:
    """Sees one mutant from its third seed on; another breaks down."""

    NAME = "fake"
    MUTANTS = {"seen": "a", "breaks": "b", "unseen": "c"}  # noqa: RUF012 - as scenarios have it

    @staticmethod
    def run(seed, mutant=None):
        if mutant == "breaks":
            raise KeyError("gone")
        return ["two leaders"] if mutant == "seen" and seed >= 3 else []


def test_a_mutant_that_breaks_down_is_found_too(capsys):
    assert _find_mutants(Scenario, range(1, 6), True) == 1
    table = json.loads(capsys.readouterr().out)
    assert [(row["mutant"], row["seed"], row["violation"]) for row in table] == [
        ("seen", 3, "two leaders"),
        ("breaks", 1, "KeyError: 'gone'"),
        ("unseen", None, ""),
    ]
