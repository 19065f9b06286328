"""A measuring program for the tests of bench.rows: prints a row, then ends as its task says."""

import argparse
import json
import time


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--task")
    task = json.loads(parser.parse_args().task)
    print("compiling …", flush=True)
    print(json.dumps({"name": task["name"], "value": 1}), flush=True)
    if task["end"] == "error":
        raise RuntimeError("no such device in /some/folder/file.py")
    if task["end"] == "never":
        time.sleep(60)


if __name__ == "__main__":
    main()
