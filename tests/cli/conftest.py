"""The command line, called in this process."""

import pytest

from headwise.cli import main


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """`run("eval", …)` → (exit code, standard output, standard error), through the real entry point."""

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call
