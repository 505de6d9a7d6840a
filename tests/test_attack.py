"""A short `make attack`: strangers at the control and data ports under load."""
from attack import attack, problems, told


def test_strangers_cost_nothing_but_a_handshake(tmp_path, model):
    seen = attack(tmp_path, model, 6, 1.5)
    print(told(seen))
    # Windows this short scatter on a busy machine; `make attack` asks for 0.9.
    found = problems(seen, 0.5)
    assert not found, "\n".join(found)
    assert seen["attackers"]["did"].get("refused at a data port"), "data ports close when a group has formed"
