"""Asks a control port for something without a token, as a stranger would, and prints what it answers: an HTTP status or a gRPC code.

Arguments: address, and one or more of http:PORT:METHOD:PATH and grpc:PORT:SERVICE/METHOD.
"""

import json
import sys

import grpc
import requests

WAIT_S = 10


def main() -> None:
    address, *asked = sys.argv[1:]
    print(json.dumps({each: _http(address, each) if each.startswith("http:") else _grpc(address, each) for each in asked}))


def _http(address: str, asked: str) -> str:
    _, port, method, path = asked.split(":")
    return str(requests.request(method, f"http://{address}:{port}{path}", timeout=WAIT_S).status_code)


def _grpc(address: str, asked: str) -> str:
    _, port, method = asked.split(":")
    with grpc.insecure_channel(f"{address}:{port}") as channel:
        try:
            channel.unary_unary(f"/ray.rpc.{method}")(b"", timeout=WAIT_S)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


if __name__ == "__main__":
    main()
