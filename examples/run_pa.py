#!/usr/bin/env python3
"""run_pa's command line for Phalanx: the same options, unique abbreviations included.

Becomes `phalanx run` with the full option names. The program is PHALANX_BIN, or the one of this
checkout or installation, or the first on PATH. RANK, LOCAL_RANK, WORLD_SIZE and RANK_TABLE_FILE
reach it unchanged.
"""
import argparse
import os
import pathlib
import shutil
import sys

PARALLEL = ("dp", "tp", "sp", "cp", "moe_tp", "moe_ep", "pp", "microbatch_size")
INTEGERS = ("max_prefill_batch_size", "max_batch_size", "max_input_length", "max_output_length",
            "max_position_embeddings", "max_prefill_tokens", "block_size", "max_loras",
            "max_lora_rank", *PARALLEL)
FLAGS = ("ignore_eos", "is_chat_model", "is_embedding_model", "enable_atb_torch",
         "trust_remote_code", "distributed_enable")
STRINGS = ("input_file", "input_dict", "chat_template", "kw_args", "lora_modules")


def truth(text):
    if text.lower() in ("1", "true", "yes"):
        return "true"
    if text.lower() in ("0", "false", "no", ""):
        return "false"
    raise argparse.ArgumentTypeError(f"found {text!r}, expected True or False")


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", required=True, help="weight directory")
    parser.add_argument("--input_texts", nargs="+", help="prompts, or files that hold one each")
    parser.add_argument("--input_ids", nargs="+", help="comma-separated ids, one list per request")
    parser.add_argument("--load_tokenizer", type=truth, help="False needs --input_ids")
    for name in STRINGS:
        parser.add_argument(f"--{name}", type=str)
    for name in INTEGERS:
        parser.add_argument(f"--{name}", type=int)
    for name in FLAGS:
        parser.add_argument(f"--{name}", action="store_true")
    return vars(parser.parse_args(arguments))


def find_program():
    named = os.environ.get("PHALANX_BIN")
    if named:
        return named
    roots = [pathlib.Path(__file__).resolve().parent.parent]
    if os.environ.get("ATB_SPEED_HOME_PATH"):
        roots.insert(0, pathlib.Path(os.environ["ATB_SPEED_HOME_PATH"]))
    for root in roots:
        for place in ("bin/phalanx", "build/release/phalanx"):
            if os.access(root / place, os.X_OK):
                return str(root / place)
    return shutil.which("phalanx")


def command_line(options):
    """Full option names; values joined by "=" so that a leading "-" stays a value."""
    line = []
    for name, value in options.items():
        if value is True:
            line.append(f"--{name}")
        elif isinstance(value, list):
            line += [f"--{name}", *value]
        else:
            line.append(f"--{name}={value}")
    return line


def main():
    options = parse(sys.argv[1:])
    program = find_program()
    if program is None:
        print("run_pa: the phalanx program was not found. Fix: export PHALANX_BIN=/path/to/phalanx, "
              "or put it on PATH", file=sys.stderr)
        return 1
    os.execv(program, ["phalanx", "run", *command_line(options)])


if __name__ == "__main__":
    sys.exit(main())
