"""What is remembered of picture files between two starts."""

from annotations.image_checks import FileMemory


def test_what_is_remembered_of_a_file_holds_for_the_file_as_it_was_before_it_was_looked_at(tmp_path):
    path, cache = tmp_path / "a.png", tmp_path / "cache"
    path.write_bytes(b"old")
    memory = FileMemory("looks", tmp_path, cache)
    assert memory.get(path) is None
    path.write_bytes(b"newer")  # while the old one was looked at
    memory.put(path, 1)
    memory.save()
    assert memory.get(path) == 1 and FileMemory("looks", tmp_path, cache).get(path) is None
    path.write_bytes(b"newer")
    memory = FileMemory("looks", tmp_path, cache)
    assert memory.get(path) is None
    memory.put(path, 2)
    memory.save()
    assert FileMemory("looks", tmp_path, cache).get(path) == 2
