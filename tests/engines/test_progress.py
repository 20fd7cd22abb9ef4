from klein_kv.engines.progress import PhaseTree


def test_nested_phases_make_one_rising_number() -> None:
    tree = PhaseTree()
    seen = []

    def step(name: str) -> None:
        tree.step(name)
        seen.append(tree.fraction)

    assert not tree.start("build", None, 4)
    assert tree.start("parse", "build", 2)
    step("parse")
    step("parse")
    tree.finish("parse")
    step("build")
    assert tree.start("optimize", "build", 10)
    assert not tree.start("inner", "optimize", 0)
    step("inner")
    step("optimize")
    step("unknown")
    tree.finish("inner")
    tree.finish("optimize")
    step("build")
    assert seen == sorted(seen)
    assert seen[:3] == [0.125, 0.25, 0.25]
    assert seen[-1] == 0.5
    tree.finish("build")
    assert tree.fraction == 1.0
