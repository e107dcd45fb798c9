"""The annotation server over HTTP, in a process of its own where it is killed."""

from __future__ import annotations

import contextlib
import http.client
import json
import multiprocessing
import socket
import sys

import pytest
from PIL import Image
from support.annotation_folder import COMPLETE, EMPTY, TOKEN, ask, port_of, serving, write_folder
from support.commands import mof

from mof import local_server
from mof.pairs.annotation.journal import JOURNAL
from mof.pairs.annotation.server import LONGEST_REQUEST, AnnotationServer


@pytest.fixture
def server(tmp_path):
    with serving(write_folder(tmp_path / "pairs")) as running:
        yield running


def test_a_pair_is_shown_saved_and_shown_again(server):
    port = port_of(server)
    status, pair, _ = ask(port, "/api/pairs/1")
    assert status == 200 and pair["clip_similarity"] == 0.98 and pair["names"][0].endswith("1-left.jpg")
    assert (pair["revision"], pair["annotation"], pair["state"], pair["next_todo"]) == (0, EMPTY, "todo", 2)
    status, saved, _ = ask(port, "/api/pairs/1", {"revision": 0, "annotation": COMPLETE})
    assert status == 200 and (saved["revision"], saved["state"], saved["missing"]) == (1, "done", [])
    assert ask(port, "/api/pairs/1")[1]["annotation"] == COMPLETE
    progress = ask(port, "/api/progress")[1]
    assert (progress["pairs"], progress["done"], progress["first"], len(progress["patterns"])) == (3, 1, 0, 9)
    status, page, reply = ask(port, "/")
    assert status == 200 and b"<!doctype html>" in page and "frame-ancestors 'none'" in reply.headers["Content-Security-Policy"]


def test_whoever_did_not_see_the_newest_is_refused_and_shown_it(server):
    ask(port_of(server), "/api/pairs/0", {"revision": 0, "annotation": COMPLETE})
    with serving(server.session.pairs.table.folder) as second:  # another server on the same folder
        status, reply, _ = ask(port_of(second), "/api/pairs/0", {"revision": 0, "annotation": EMPTY | {"question": "Mine?"}})
        assert status == 409 and reply["annotation"] == COMPLETE and reply["revision"] == 1
        assert ask(port_of(second), "/api/pairs/0", {"revision": 1, "annotation": EMPTY | {"question": "Mine?"}})[0] == 200
    assert ask(port_of(server), "/api/pairs/0")[1]["annotation"]["question"] == "Mine?"


def test_only_images_of_pairs_are_served(server):
    port, folder = port_of(server), server.session.pairs.table.folder
    (folder / "secret.jpg").write_bytes((folder / "0-left.jpg").read_bytes())
    status, data, reply = ask(port, "/images/0/0")
    assert (status, data, reply.headers["Content-Type"]) == (200, (folder / "0-left.jpg").read_bytes(), "image/jpeg")
    assert ask(port, "/images/2/1")[2].headers["Content-Type"] == "image/png"
    wrong = ("/images/3/0", "/images/0/2", "/images/-1/0", "/images/0/0/../../secret.jpg", "/images/secret.jpg", "/secret.jpg", "/pairs.csv",
             "/../../../../etc/passwd", "//etc/passwd", "/%2e%2e/pairs.csv", "/annotations.jsonl", "/page.html", "/api/pairs/3",
             "/api/pairs/-1", "/api/pairs/٣", "/api/pairs/0x1", "/api/pairs/0/")  # fmt: skip
    for path in wrong:
        assert ask(port, path.encode().decode("latin1") if path.isascii() else "/api/pairs/%D9%A3")[0] == 404, path


def test_an_image_that_browsers_cannot_show_comes_as_png_and_a_broken_one_is_named(server):
    port, folder = port_of(server), server.session.pairs.table.folder
    Image.new("CMYK", (8, 8)).save(folder / "0-left.jpg", "TIFF")
    status, data, reply = ask(port, "/images/0/0")
    assert status == 200 and reply.headers["Content-Type"] == "image/png" and data.startswith(b"\x89PNG")
    (folder / "0-left.jpg").write_bytes(b"<svg onload='alert(1)'>")
    status, reply, _ = ask(port, "/images/0/0")
    assert status == 422 and "0-left.jpg" in reply["error"]
    (folder / "0-left.jpg").unlink()
    assert ask(port, "/images/0/0")[0] == 422


@pytest.mark.parametrize("path", ["/", "/api/progress", "/images/0/0", "/api/pairs/0"])
def test_another_host_name_is_refused(server, path):
    """A foreign page can have its own name point to 127.0.0.1, and would then read what this server says."""
    port = port_of(server)
    assert ask(port, path, headers={"Host": f"localhost:{port}"})[0] == 200
    assert ask(port, path, headers={"Host": "localhost:9000"})[0] == 200  # a port that was forwarded
    for host in (f"evil.example:{port}", f"127.0.0.1.evil.example:{port}", f"evil.example:{port}@127.0.0.1", ""):
        assert ask(port, path, headers={"Host": host})[0] == 403


@pytest.mark.parametrize("path", ["/", "/api/progress", "/images/0/0", "/api/pairs/0", "/nowhere"])
def test_nothing_is_shown_without_the_token(server, path):
    port = port_of(server)
    for cookie in ("", f"mof-token-{port}=wrong", f"mof-token-1={TOKEN}", f"mof-token-{port}=\u00e9"):
        status, reply, _ = ask(port, path, headers={"Cookie": cookie})
        assert status == 403 and "mof blind-pairs annotate" in reply["error"]
        assert ask(port, f"{path}?token=wrong", headers={"Cookie": cookie})[0] == 403
    assert ask(port, "/api/pairs/0", {"revision": 0, "annotation": COMPLETE}, {"Cookie": ""})[0] == 403
    assert ask(port, f"{path}?token={TOKEN}", headers={"Cookie": ""})[0] == (404 if path == "/nowhere" else 200)


def test_the_address_holds_the_token_and_the_page_gets_it_as_a_cookie(server):
    assert server.url == f"http://127.0.0.1:{port_of(server)}/?token={TOKEN}"
    _, _, reply = ask(port_of(server), f"/?token={TOKEN}", headers={"Cookie": ""})
    cookie = reply.headers["Set-Cookie"]
    assert cookie.startswith(f"mof-token-{port_of(server)}={TOKEN};") and "HttpOnly" in cookie and "SameSite=strict" in cookie
    with serving(server.session.pairs.table.folder) as second:
        assert second.address != server.address
    assert AnnotationServer(server.session.pairs.table.folder).token != AnnotationServer(server.session.pairs.table.folder).token


def test_hundreds_of_silent_connections_lock_nobody_out(server, monkeypatch):
    monkeypatch.setattr(local_server, "CONNECTIONS", 20)
    silent = [socket.create_connection(("127.0.0.1", port_of(server)), timeout=600) for _ in range(60)]
    assert ask(port_of(server), "/api/progress")[0] == 200
    silent[0].settimeout(120)
    with contextlib.suppress(ConnectionResetError):
        assert silent[0].recv(10) == b""  # the oldest was closed
    for connection in silent:
        connection.close()


def test_a_post_of_a_foreign_page_saves_nothing(server):
    port = port_of(server)
    body = {"revision": 0, "annotation": COMPLETE}
    origins = (
        "http://evil.example",
        "null",
        f"https://127.0.0.1:{port}",
        "http://127.0.0.1:1",
        f"http://127.0.0.1:{port}.evil.example",
        "",
    )
    for origin in origins:
        assert ask(port, "/api/pairs/0", body, {"Origin": origin})[0] == 403, origin
    assert ask(port, "/api/pairs/0", body, {"Host": "evil.example"})[0] == 403
    assert ask(port, "/api/pairs/0", body, {"Content-Type": "text/plain"})[0] == 400  # what a form may send without asking
    assert not (server.session.pairs.table.folder / JOURNAL).exists()
    assert ask(port, "/api/pairs/0", body, {"Origin": f"http://127.0.0.1:{port}"})[0] == 200


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"\xff", b"[" * 50_000, {}, {"revision": 0}, {"annotation": COMPLETE}, {"revision": "0", "annotation": COMPLETE},
        {"revision": 0, "annotation": COMPLETE | {"pattern": "Colour"}}, {"revision": 0, "annotation": COMPLETE | {"question": "x" * 3000}},
        b"x" * (LONGEST_REQUEST + 1),
    ],
    ids=lambda body: str(body)[:30],
)  # fmt: skip
def test_what_is_no_annotation_is_refused_in_words(server, body):
    status, reply, _ = ask(port_of(server), "/api/pairs/0", body)
    assert status == 400 and reply["error"]
    assert not (server.session.pairs.table.folder / JOURNAL).exists()
    assert ask(port_of(server), "/api/pairs/0")[0] == 200  # still there


def test_a_damaged_journal_is_named(server):
    (server.session.pairs.table.folder / JOURNAL).write_text("nonsense\n")
    status, reply, _ = ask(port_of(server), "/api/pairs/0", {"revision": 0, "annotation": COMPLETE})
    assert status == 400 and "line 1" in reply["error"]


def test_one_connection_serves_many_requests_refused_ones_among_them(server):
    connection = http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=600)
    for path, headers, status in (("/api/pairs/0", {"Host": "evil"}, 403), ("/nowhere", {}, 404), ("/api/pairs/0", {}, 400)):
        own = {"Content-Type": "application/json", "Cookie": f"mof-token-{port_of(server)}={TOKEN}"}
        connection.request("POST", path, b'{"revision": 0}', own | headers)
        reply = connection.getresponse()
        assert reply.status == status and json.loads(reply.read())["error"]
    connection.close()


def test_it_listens_on_this_machine_only_and_says_when_the_port_is_taken(server):
    assert server.address[0] == "127.0.0.1"
    with pytest.raises(ValueError, match=f"port {port_of(server)}"):
        AnnotationServer(server.session.pairs.table.folder, port_of(server))


@pytest.mark.multiprocess
def test_a_killed_server_has_lost_nothing_that_it_confirmed(tmp_path):
    folder = write_folder(tmp_path / "pairs")
    context = multiprocessing.get_context("fork")  # a new interpreter would import for seconds
    receiver, sender = context.Pipe()

    def work():
        server = AnnotationServer(folder, token=TOKEN)
        sender.send(port_of(server))
        server.serve_forever()

    process = context.Process(target=work)
    process.start()
    port = receiver.recv()
    for revision, question in enumerate(("One?", "Two?", "Three?")):
        assert ask(port, "/api/pairs/0", {"revision": revision, "annotation": COMPLETE | {"question": question}})[0] == 200
    process.kill()
    process.join()
    with (folder / JOURNAL).open("ab") as file:
        file.write(b'{"image_i": "torn')  # as a kill in the middle of writing leaves it
    with serving(folder) as server:
        pair, progress = (ask(port_of(server), path)[1] for path in ("/api/pairs/0", "/api/progress"))
    assert (pair["annotation"]["question"], pair["revision"], progress["done"], progress["first"]) == ("Three?", 3, 1, 1)


def test_the_command_says_where_and_how_far(tmp_path, monkeypatch):
    def stop(server):
        raise KeyboardInterrupt

    monkeypatch.setattr(AnnotationServer, "serve_forever", stop)
    opened = []
    monkeypatch.setattr("typer.launch", opened.append)
    folder = write_folder(tmp_path / "pairs")
    for more, pages in ((["--no-browser"], 0), ([], 1)):
        shown = mof("blind-pairs", "annotate", folder, *more)
        assert shown.exit_code == 0 and "3 pairs" in shown.output and "0 of 3 pairs are done" in shown.output
        assert len(opened) == pages
    refused = mof("blind-pairs", "annotate", tmp_path)
    assert refused.exit_code == 2 and "expected a folder that `mof blind-pairs` wrote" in refused.output


@pytest.mark.parametrize("sent", [b"", b"GET /", b"GET / HTTP/1.1\r\nHost: "])
def test_a_client_that_does_not_finish_its_header_is_hung_up_on(server, monkeypatch, sent):
    monkeypatch.setattr(local_server, "SILENCE", 0.2)
    address = ("127.0.0.1", port_of(server))
    with socket.create_connection(address, timeout=600) as silent, contextlib.suppress(ConnectionError):  # it may be hung up before
        silent.sendall(sent)
        assert silent.recv(1000) == b""


def test_a_client_that_goes_away_is_no_bug(tmp_path, caplog):
    with serving(write_folder(tmp_path / "pairs")) as server:
        port = port_of(server)
        head = f"POST /api/pairs/0 HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\nContent-Length: 10\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port), timeout=600) as client:
            client.sendall(head.encode())
            assert ask(port, "/api/progress")[0] == 200
    assert not [record for record in caplog.records if record.exc_info]


def test_a_silent_client_keeps_nobody_waiting_and_is_refused_in_the_end(server, monkeypatch):
    monkeypatch.setattr(local_server, "SILENCE", 0.5)
    with socket.create_connection(("127.0.0.1", port_of(server)), timeout=600) as silent:
        lines = (
            "POST /api/pairs/0 HTTP/1.1",
            f"Host: 127.0.0.1:{port_of(server)}",
            f"Cookie: mof-token-{port_of(server)}={TOKEN}",
            "Content-Type: application/json",
            "Content-Length: 10",
            "",
            "",
        )
        silent.sendall("\r\n".join(lines).encode())
        assert ask(port_of(server), "/api/progress")[0] == 200
        assert silent.recv(1000).startswith(b"HTTP/1.1 408")


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    for module in ("mof.pairs.annotation.server", "mof.local_server"):
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "uvicorn", None)  # as if it were not installed
    refused = mof("blind-pairs", "annotate", write_folder(tmp_path))
    assert refused.exit_code == 2 and "uvicorn" in refused.output and "mof-vig[annotate]" in refused.output
