from pregate.system.console import console, first_of


def test_first_of_tells_how_many_more_there_are():
    assert first_of(["a"]) == "a"
    assert first_of(["a", "b", "c"]) == "a and 2 more"
    assert first_of(["a", "b", "c"], 3, " ") == "a b c"


def test_console_is_wide_enough_for_the_tables_when_piped(capsys):
    assert console().width == 100
