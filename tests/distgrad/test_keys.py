from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distgrad import key_files
from distgrad.errors import KeyFileError
from distgrad.keys import BrokerKeys, ClientKeys, Role, add_client, check_name, revoke_client
from distgrad.sockets import client_keys, curve_pair
from support.key_folders import make_key_folder

NEEDS_MODES = pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
# A modification time that is long past, so that a folder counts as settled.
LONG_AGO_NS = 10**18


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def add(folder: Path, name: str = "w1", role: Role = Role.WORKER) -> tuple[ClientKeys, Path]:
    return add_client(folder, name, role, curve_pair)


def test_a_client_file_holds_its_secret_and_the_brokers_public_key(folder: Path) -> None:
    written, path = add(folder)

    loaded, broker = ClientKeys.load(path), BrokerKeys.load(folder)

    assert loaded == written
    assert (loaded.name, loaded.role) == ("w1", Role.WORKER)
    assert loaded.broker_public == broker.public
    assert broker.clients[loaded.public].name == "w1"
    assert loaded.secret not in (loaded.public, broker.secret)


def test_the_folder_holds_no_secret_of_a_client(folder: Path) -> None:
    written, path = add(folder)

    assert path == folder.parent / "w1.key"
    assert sorted(os.listdir(folder)) == ["broker.key", "w1.pub"]
    assert all(written.secret not in (folder / name).read_bytes() for name in os.listdir(folder))


def test_all_clients_of_a_folder_know_the_same_broker(folder: Path) -> None:
    first, _ = add(folder, "w1")
    second, _ = add(folder, "a1", Role.ADMIN)

    assert first.broker_public == second.broker_public
    assert {(client.name, client.role) for client in BrokerKeys.load(folder).clients.values()} == {
        ("w1", Role.WORKER),
        ("a1", Role.ADMIN),
    }


def test_secrets_are_not_shown(folder: Path) -> None:
    written, _ = add(folder)
    broker = BrokerKeys.load(folder)

    assert written.secret.decode() not in repr(written)
    assert broker.secret.decode() not in repr(broker)


@NEEDS_MODES
def test_secret_files_are_private_whatever_the_umask(folder: Path) -> None:
    before = os.umask(0)
    try:
        _, path = add(folder)
    finally:
        os.umask(before)

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((folder / "broker.key").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@NEEDS_MODES
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644, 0o700 | 0o010])
def test_a_secret_that_others_can_touch_is_refused_with_the_command_that_helps(folder: Path, mode: int) -> None:
    _, path = add(folder)
    for loose, load in ((path, ClientKeys.load), (folder / "broker.key", lambda _: BrokerKeys.load(folder))):
        loose.chmod(mode)

        with pytest.raises(KeyFileError, match="open to others") as caught:
            load(loose)

        assert caught.value.hint == f"chmod 600 {loose}"


@NEEDS_MODES
@pytest.mark.parametrize("which", ["", "w1.pub"])
def test_what_others_could_change_is_refused(folder: Path, which: str) -> None:
    add(folder)
    (folder / which).chmod(0o777)

    with pytest.raises(KeyFileError, match="could let themselves in"):
        BrokerKeys.load(folder)


def test_a_name_is_used_once_and_nothing_is_overwritten(folder: Path) -> None:
    _, path = add(folder)
    before = path.read_bytes(), (folder / "w1.pub").read_bytes()

    with pytest.raises(KeyFileError, match="exists already"):
        add_client(folder, "w1", Role.ADMIN, curve_pair, out=folder.parent / "other.key")

    assert (path.read_bytes(), (folder / "w1.pub").read_bytes()) == before
    assert not (folder.parent / "other.key").exists()


def test_a_file_in_the_way_of_the_clients_leaves_no_entry(folder: Path) -> None:
    (folder.parent / "w1.key").write_text("mine")

    with pytest.raises(KeyFileError, match="exists already"):
        add(folder)

    assert (folder.parent / "w1.key").read_text() == "mine"
    assert BrokerKeys.load(folder).clients == {}


def test_a_failed_entry_takes_the_clients_file_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = key_files.create

    def create(path: Path, mode: int, comment: str, values: Mapping[str, str]) -> None:
        if path.suffix == ".pub":
            raise KeyFileError("disk full")
        original(path, mode, comment, values)

    monkeypatch.setattr(key_files, "create", create)

    with pytest.raises(KeyFileError, match="disk full"):
        add(folder)

    assert not (folder.parent / "w1.key").exists()


def test_an_unwritable_place_is_said(folder: Path) -> None:
    with pytest.raises(KeyFileError, match="cannot write"):
        add_client(folder, "w1", Role.WORKER, curve_pair, out=folder / "nowhere" / "w1.key")
    (folder.parent / "file").write_text("")
    with pytest.raises(KeyFileError, match="cannot make key folder"):
        add(folder.parent / "file" / "keys")


def test_a_revoked_name_can_come_back_with_another_key(folder: Path) -> None:
    first, path = add(folder)
    revoke_client(folder, "w1")
    path.unlink()

    second, _ = add(folder)

    assert list(BrokerKeys.load(folder).clients) == [second.public]
    assert first.public != second.public


def test_revoking_nobody_is_an_error(folder: Path) -> None:
    add(folder)

    with pytest.raises(KeyFileError, match="no key named w2"):
        revoke_client(folder, "w2")


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "-x", "a/b", "a b", "ä", "a\n", "x" * 65, "broker"])
@pytest.mark.parametrize("use", [check_name, lambda name: add(Path("never-made"), name)])
def test_names_that_are_no_names_are_refused(name: str, use: Callable[[str], object]) -> None:
    with pytest.raises(KeyFileError, match="a key's name"):
        use(name)

    assert not Path("never-made").exists()


@given(st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", fullmatch=True).filter(lambda name: name != "broker"))
def test_all_other_names_are_fine(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "format = 1",
        "format = 2",
        "x" * 100_000,
        "\0\xff",
        'format = 1\nname = "w1"\nrole = "worker"\npublic = "short"',
        'format = 1\nname = "w1"\nrole = "king"\npublic = "{public}"',
        'format = 1\nname = 7\nrole = "worker"\npublic = "{public}"',
        'format = 1\nname = "../up"\nrole = "worker"\npublic = "{public}"',
        'format = 1\nname = "w2"\nrole = "worker"\npublic = "{public}"',
    ],
)
def test_what_is_no_key_file_is_refused_and_named(folder: Path, text: str) -> None:
    written, path = add(folder)
    path.write_text(text.format(public=written.public.decode()), encoding="latin-1")
    (folder / "w1.pub").write_text(text.format(public=written.public.decode()), encoding="latin-1")

    with pytest.raises(KeyFileError, match=r"w1\.key"):
        ClientKeys.load(path)
    with pytest.raises(KeyFileError, match=r"w1\.pub"):
        BrokerKeys.load(folder)


def test_one_key_under_two_names_is_refused(folder: Path) -> None:
    add(folder)
    (folder / "w2.pub").write_text((folder / "w1.pub").read_text().replace("w1", "w2"))

    with pytest.raises(KeyFileError, match="the same key as"):
        BrokerKeys.load(folder)


def test_folder_and_file_mixed_up_are_told_apart(folder: Path) -> None:
    _, path = add(folder)

    with pytest.raises(KeyFileError, match="what the broker takes"):
        ClientKeys.load(folder)
    with pytest.raises(KeyFileError, match="what a client takes"):
        BrokerKeys.load(path)


def test_missing_ones_come_with_the_command_that_makes_them(folder: Path) -> None:
    for load in (ClientKeys.load, BrokerKeys.load):
        with pytest.raises(KeyFileError, match="does not exist") as caught:
            load(folder)
        assert "distgrad keys new" in str(caught.value.hint)
    folder.mkdir()
    with pytest.raises(KeyFileError, match=r"broker\.key does not exist"):
        BrokerKeys.load(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_is_refused_and_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "w1.key", 0o600)

    with pytest.raises(KeyFileError, match="is not a file"):
        ClientKeys.load(tmp_path / "w1.key")


def test_keys_are_accepted_loaded_as_a_path_or_not_at_all(folder: Path) -> None:
    written, path = add(folder)

    assert client_keys(None) is None
    assert client_keys(written) is written
    assert client_keys(str(path)) == client_keys(path) == written


def settle(folder: Path) -> BrokerKeys:
    """Load a folder whose last change is long past."""
    os.utime(folder, ns=(LONG_AGO_NS, LONG_AGO_NS))
    return BrokerKeys.load(folder)


def test_an_unchanged_folder_is_not_read_again(folder: Path) -> None:
    add(folder)
    loaded = settle(folder)

    assert loaded.refreshed() is loaded


def test_a_folder_that_has_just_changed_is_read_again_because_a_second_change_may_not_show(folder: Path) -> None:
    add(folder)
    loaded = BrokerKeys.load(folder)
    stamp = folder.stat().st_mtime_ns

    revoke_client(folder, "w1")
    os.utime(folder, ns=(stamp, stamp))

    assert loaded.refreshed().clients == {}


def test_new_and_revoked_keys_are_seen(folder: Path) -> None:
    first, _ = add(folder)
    loaded = settle(folder)

    second, _ = add(folder, "w2")
    revoke_client(folder, "w1")

    refreshed = loaded.refreshed()
    assert list(refreshed.clients) == [second.public]
    assert (refreshed.public, refreshed.secret) == (loaded.public, loaded.secret)
    assert first.public not in refreshed.clients


def test_an_unreadable_entry_keeps_no_revoked_key_alive(folder: Path) -> None:
    add(folder)
    second, _ = add(folder, "w2")
    loaded = settle(folder)

    revoke_client(folder, "w1")
    (folder / "w3.pub").write_text("half wri")

    refreshed = loaded.refreshed()
    assert list(refreshed.clients) == [second.public]
    assert "w3.pub" in refreshed.problems[0]


def test_a_folder_that_went_away_is_said(folder: Path) -> None:
    add(folder)
    loaded = settle(folder)
    folder.rename(folder.with_name("elsewhere"))

    with pytest.raises(KeyFileError, match="cannot read key folder"):
        loaded.refreshed()


def test_other_files_in_the_folder_are_none_of_our_business(folder: Path) -> None:
    add(folder)
    (folder / "README").write_text("hello")
    (folder / ".w2.pub").write_text("an editor's")

    assert len(BrokerKeys.load(folder).clients) == 1


def test_the_tests_own_folder_has_each_role(tmp_path: Path) -> None:
    made = make_key_folder(tmp_path)

    assert [ClientKeys.load(path).role for path in made[1:]] == [Role.WORKER, Role.ADMIN, Role.READ]
