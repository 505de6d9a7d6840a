"""examples/run_pa.py: the guide's loop (one process per rank) and one command for all ranks."""
import subprocess

from support.instance import Process, free_ports, run_program
from support.paths import ROOT, clean_environment, demo_model, program

QUESTION = "What's Deep Learning?"

# The multi-node guide's loop; two servers of one card each on this machine.
LOOP = """
set -e
cd ${ATB_SPEED_HOME_PATH}
WORLD_SIZE_LOCAL=1
for((RANK_ID=$RANK_ID_START;RANK_ID<$((WORLD_SIZE_LOCAL+RANK_ID_START));RANK_ID++));
do
export RANK=$RANK_ID
export LOCAL_RANK=$RANK_ID
python3 ./examples/run_pa.py  --model_path %s \
--max_output_length 35  --max_batch_size 1 --input_text "What's Deep Learning?" &
done
wait
"""


def answer_of(text):
    lines = text.splitlines()
    answers = [line for line in lines if "Answer[0]:" in line]
    counts = [line for line in lines if "Generate[0] token num:" in line]
    assert len(answers) == 1 and len(counts) == 1, text
    return text[text.index("Answer[0]:"):text.index("Generate[0]")].strip(), counts[0]


def test_guides_loop_on_two_servers_equals_one_command(tmp_path):
    table = tmp_path / "ranktable.json"
    done = run_program("ranktable", "make", "--hosts", "127.0.0.1,127.0.0.2", "-o", table)
    assert done.returncode == 0, done.stderr
    port = free_ports(1)[0]
    nodes = []
    for start, address in ((0, "127.0.0.1"), (1, "127.0.0.2")):
        environment = clean_environment(
            ATB_SPEED_HOME_PATH=ROOT, ATB_LLM_HCCL_ENABLE="1", WORLD_SIZE="2", RANK_TABLE_FILE=table,
            RANK_ID_START=start, MASTER_PORT=port, MIES_CONTAINER_IP=address, PHALANX_BIN=program())
        nodes.append(Process(f"loop of {address}", ["bash", "-c", LOOP % demo_model()], environment))
    try:
        for node in nodes:
            assert node.wait(120) == 0, node.text()
        answer, count = answer_of(nodes[0].text("out"))
        assert "35" in count
        assert "Answer[" not in nodes[1].text()
        assert "LOCAL_RANK" in nodes[1].text("err")  # equal to RANK: accepted with a warning
    finally:
        for node in nodes:
            node.kill()

    one = run_program("run", "--model_path", demo_model(), "--max_output_length", 35,
                      "--max_batch_size", 1, "--input_texts", QUESTION, "--tp", 2, seconds=120)
    assert one.returncode == 0, one.stderr
    assert answer_of(one.stdout)[0] == answer


def test_several_texts_and_abbreviated_options(tmp_path):
    done = subprocess.run(
        ["python3", "examples/run_pa.py", "--model_p", demo_model(), "--max_out", "5",
         "--max_batch_s", "2", "--input_text", "Hello", "The capital of France is"],
        cwd=ROOT, env=clean_environment(PHALANX_BIN=program()), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Answer[0]:" in done.stdout and "Answer[1]:" in done.stdout
    assert "Paris" in done.stdout[done.stdout.index("Answer[1]:"):]
    assert done.stdout.index("---------------begin inference---------------") < \
        done.stdout.index("---------------end inference---------------")


def test_bad_options_are_refused():
    def run(*options):
        return subprocess.run(["python3", ROOT / "examples/run_pa.py", *map(str, options)],
                              env=clean_environment(PHALANX_BIN=program()), stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True, timeout=60)
    assert "--model_path" in run().stderr
    done = run("--model_path", demo_model(), "--max_prefill", "3")
    assert done.returncode == 2 and "ambiguous" in done.stderr
    done = run("--model_path", "/no/such/weights")
    assert done.returncode == 1 and "/no/such/weights" in done.stderr
    done = run("--model_path", demo_model(), "--pp", "2")
    assert done.returncode == 1 and "--pp" in done.stderr
