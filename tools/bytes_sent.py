"""How many bytes of a blob a docker-registry sent, by its log (level info, formatter json).

python tools/bytes_sent.py LOG DIGEST
"""

import json
import sys
from pathlib import Path


def bytes_sent(log: Path, digest: str) -> int:
    """The sum over all answered GET requests for the blob that came from ctrfs."""
    total = 0
    for line in log.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if (
            record.get("msg") == "response completed"
            and record.get("http.request.method") == "GET"
            and record.get("http.request.uri", "").partition("?")[0].endswith(digest)
            and record.get("http.request.useragent", "").startswith("ctrfs/")
            and record.get("http.response.status") in (200, 206)
        ):
            total += int(record.get("http.response.written", 0))
    return total


if __name__ == "__main__":
    print(bytes_sent(Path(sys.argv[1]), sys.argv[2]))
