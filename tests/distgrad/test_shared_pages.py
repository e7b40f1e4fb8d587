"""Memory that processes share: found by its address and nothing else, checked, and gone with its last user."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distgrad.shared_pages import Address, SharedPages, Unavailable, address_of, attach, host_name

if sys.platform != "linux":
    pytest.skip("memory is shared on Linux only", allow_module_level=True)

SIZE = 3 * 4096

# Another process reads what it finds, writes, and says what it saw.
OTHER = """
import sys
from distgrad.shared_pages import Address, attach
pid, fd, name, size = sys.argv[1:]
memory = attach(Address(int(pid), int(fd), name, int(size)), writes=True)
print(memory[5], flush=True)
memory[6] = 9
"""


def test_another_process_sees_what_is_written_and_writes_itself() -> None:
    pages = SharedPages(SIZE)
    pages.array[5] = 7

    command = [sys.executable, "-c", OTHER, *map(str, pages.address)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)

    assert ended.stdout == "7\n"
    assert pages.array[6] == 9


def test_what_is_read_only_cannot_be_mapped_to_be_written_to() -> None:
    pages = SharedPages(SIZE, is_read_only=True)
    pages.array[0] = 1

    assert attach(pages.address, writes=False)[0] == 1
    with pytest.raises(Unavailable, match="cannot be mapped"):
        attach(pages.address, writes=True)
    with pytest.raises(ValueError, match="read-only"):
        attach(pages.address, writes=False)[0] = 2


def test_nobody_can_cut_it_off_or_make_it_longer() -> None:
    pages = SharedPages(SIZE)

    for size in (0, SIZE - 1, SIZE + 4096):
        with pytest.raises(PermissionError):
            os.ftruncate(pages.address.fd, size)


def test_it_stays_while_a_view_of_it_lives_and_then_is_given_back() -> None:
    pages = SharedPages(SIZE)
    link = f"/proc/self/fd/{pages.address.fd}"
    view = pages.array[4096:].view(np.float32)

    del pages
    gc.collect()
    assert os.readlink(link).startswith("/memfd:distgrad-")
    view[:] = 1

    del view
    gc.collect()
    assert not os.path.lexists(link)


def test_a_mapping_outlives_the_process_that_made_it() -> None:
    program = (
        "import sys; from distgrad.shared_pages import SharedPages; p = SharedPages(8192); p.array[:] = 3\n"
        "print(*p.address, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        pid, fd, name, size = process.stdout.readline().split()
        address = Address(int(pid), int(fd), name, int(size))
        memory = attach(address, writes=True)
        process.kill()
        process.wait()

    assert (memory == 3).all()
    with pytest.raises(Unavailable):
        attach(address, writes=True)


def test_an_address_that_leads_elsewhere_is_refused() -> None:
    pages, other = SharedPages(SIZE), SharedPages(SIZE)
    address = pages.address
    with open(os.devnull, "rb") as file:
        for wrong in (
            address._replace(name=other.address.name),
            address._replace(fd=other.address.fd),
            address._replace(fd=file.fileno()),
            address._replace(fd=9999),
            address._replace(pid=2**22 + 1),
            address._replace(size=SIZE + 4096),
            address._replace(size=0),
            address._replace(name="distgrad-../../x"),
            address._replace(name="shm"),
        ):
            with pytest.raises(Unavailable):
                attach(wrong, writes=False)


def test_memory_without_seals_is_refused() -> None:
    name = "distgrad-" + "0" * 32
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, SIZE)
        with pytest.raises(Unavailable, match="sealed"):
            attach(Address(os.getpid(), fd, name, SIZE), writes=False)
    finally:
        os.close(fd)


def test_more_than_there_is_is_an_error_and_no_signal() -> None:
    before = len(os.listdir("/proc/self/fd"))

    with pytest.raises(Unavailable, match="cannot be shared"):
        SharedPages(1 << 60)

    assert len(os.listdir("/proc/self/fd")) == before


@given(
    st.one_of(st.none(), st.integers(), st.text(), st.lists(st.one_of(st.integers(), st.text(), st.none()), max_size=5))
)
def test_no_value_from_the_wire_is_an_address_unless_it_has_the_form_of_one(value: Any) -> None:
    try:
        address = address_of(value)
    except Unavailable:
        return
    assert [type(part) for part in value] == [int, int, str, int]
    with pytest.raises(Unavailable):
        attach(address, writes=False)


def test_a_host_has_one_name_for_all_its_processes() -> None:
    program = "from distgrad.shared_pages import host_name; print(host_name())"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)

    assert ended.stdout.strip() == host_name()
