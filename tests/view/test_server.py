"""Who may ask: the guard, the headers, the address, and what the page's callbacks do with values that no page would send."""

import contextlib
import http.client
import json
import socket
import subprocess
import sys
import threading

import pytest

pytest.importorskip("dash")
pytest.importorskip("waitress")

from headwise.errors import HeadwiseError, ViewError
from headwise.hub import load_model
from headwise.units import HeadSet, Unit
from headwise.view import parts, server
from headwise.view.server import MAX_REQUEST, make_explorer, make_server
from view_helper import LLAMA, folder_of


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifacts")
    folder_of(folder)
    running, url = make_server(make_explorer([folder], [(*load_model(LLAMA), "tiny")]))
    threading.Thread(target=running.run, daemon=True).start()
    yield int(url.rsplit(":", 1)[1].strip("/"))
    running.close()


def ask(port, path="/", method="GET", body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, body, {"Host": f"127.0.0.1:{port}", **headers})
    answer = connection.getresponse()
    return answer.status, answer.read().decode(errors="replace"), dict(answer.getheaders())


def test_it_listens_on_the_loopback_address_only(site):
    with socket.socket() as other:
        other.settimeout(2)
        assert other.connect_ex(("127.0.0.1", site)) == 0
    with pytest.raises(ViewError, match=f"port {site} cannot be taken"):
        make_server(make_explorer([__file__.replace("test_server.py", "")]), port=site)


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "localhost.evil.example:{port}", ""])
def test_names_of_other_hosts_are_refused(site, host):
    status, text, _ = ask(site, Host=host.format(port=site))
    assert status in (400, 403)
    assert "headwise explorer" not in text


def test_both_names_of_this_machine_are_answered(site):
    for host in (f"127.0.0.1:{site}", f"localhost:{site}"):
        assert ask(site, Host=host)[0] == 200


def test_other_sites_may_not_post(site):
    body = json.dumps({"output": "version.data", "inputs": []})
    status, _, _ = ask(
        site,
        "/_dash-update-component",
        "POST",
        body,
        Origin="http://evil.example",
        **{"Content-Type": "application/json"},
    )
    assert status == 403


def test_large_bodies_are_refused(site):
    length = {"Content-Length": str(MAX_REQUEST + 1)}  # said, not sent: the answer comes before the body
    status, _, _ = ask(site, "/_dash-update-component", "POST", b"x", **length, **{"Content-Type": "application/json"})
    assert status == 413


@pytest.mark.parametrize(
    "path",
    ["/assets/../server.py", "/assets/..%2fserver.py", "/assets/%2e%2e/server.py", "/../../etc/passwd", "/server.py"],
)
def test_paths_lead_nowhere(site, path):
    _, text, _ = ask(site, path)
    assert "make_explorer" not in text
    assert "root:" not in text


def test_headers_forbid_foreign_scripts_and_the_page_names_no_other_host(site):
    status, text, headers = ask(site)
    assert status == 200
    policy = headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe-eval" not in policy
    assert "'unsafe-inline'" not in policy.split("style-src")[0]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "https://" not in text
    assert 'src="http' not in text


def test_values_that_no_page_sends_are_refused_in_words():
    assert parts.unit_of(None) is None
    assert parts.unit_of("L1H2") == Unit("head", 1, 2)
    assert parts.set_of(["L1H2", "L0H1"]) == HeadSet.parse("L0H1,L1H2")
    assert not len(parts.set_of([]))
    for call, value in [
        (parts.unit_of, "x"), (parts.unit_of, 3), (parts.set_of, "L1H2"), (parts.set_of, ["L1H2", 3]), (parts.set_of, ["L1H2", "L0K1"]),
        (parts.ask_of, "x"), (parts.ask_of, {"prompt": 3}), (parts.ask_of, {"picture": "x"}), (parts.ask_of, {"upload": 3}),
    ]:  # fmt: skip
        with pytest.raises(HeadwiseError):
            call(value)
    for data in (None, {}, {"points": []}, {"points": [{"customdata": "<script>"}]}, {"points": [{}]}):
        assert parts.clicked(data) is parts.no_update
    assert parts.clicked({"points": [{"customdata": "L3H1"}]}) == "L3H1"


def test_without_the_front_end_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(server, "find_spec", lambda name: None)
    with pytest.raises(ViewError, match=r"dash and waitress: pip install 'headwise\[view\]'"):
        server.need_dash()


def test_at_most_two_models(tmp_path):
    model = load_model(LLAMA)
    assert make_explorer([tmp_path], [(*model, "a"), (*model, "a")]).other.name == "a (2)"
    with pytest.raises(ViewError, match="3 models"):
        make_explorer([tmp_path], [(*model, name) for name in "abc"])


@pytest.mark.slow
def test_the_command_serves_and_ends_with_ctrl_c(tmp_path):
    import signal

    folder_of(tmp_path)
    code = "import sys; from headwise.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "view", str(tmp_path), "--no-browser"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        url = process.stdout.readline().strip()
        assert ask(int(url.rsplit(":", 1)[1].strip("/")))[0] == 200
        for _ in range(
            4
        ):  # a signal that comes in the middle of a finalizer or a callback from C is lost: a user presses again
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
                break
        assert process.returncode == 0, process.stderr.read() if process.returncode is not None else "still running"
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["view", "no-such-folder"], "does not exist"),
        (["sweep", "--scores", "none.safetensors", "--full", "9", "-o", "x.json"], "none.safetensors"),
        (["sweep", "--scores", "{gates}", "--full", "nine", "-o", "x.json"], "write numbers of kv heads"),
        (["sweep", "--scores", "{gates}", "--full", "99", "-o", "x.json", "-m", LLAMA], "full_heads"),
    ],
)
def test_mistakes_on_the_command_line(tmp_path, capsys, arguments, text):
    from headwise.cli import main

    folder_of(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([part.format(gates=tmp_path / "gates.safetensors") for part in arguments])
    assert ended.value.code == 2
    assert text in capsys.readouterr().err


def test_sweep_writes_points_that_the_explorer_reads(tmp_path, capsys):
    from typer.testing import CliRunner

    from headwise.cli import app
    from headwise.view.library import Library

    folder_of(tmp_path)
    how = [
        "--length",
        "300",
        "--prompts",
        "1",
        "--tokens",
        "64",
        "--window",
        "8",
        "--sinks",
        "1",
        "--draws",
        "1",
        "--json",
    ]
    done = CliRunner().invoke(
        app,
        [
            "sweep",
            "-m",
            LLAMA,
            "--scores",
            str(tmp_path / "gates.safetensors"),
            "--full",
            "2",
            "-o",
            str(tmp_path / "p.json"),
            *how,
        ],
    )
    assert done.exit_code == 0, done.output
    assert {run["kind"] for run in json.loads(done.stdout)["runs"]} == {
        "full cache",
        "by score",
        "random",
        "the opposite",
    }
    assert Library.open([tmp_path]).items["p.json"].kind == "points"
