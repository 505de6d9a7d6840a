"""hccn_tool: the texts that scripts of the guides read, for the network interfaces of this machine."""

import json
import re
import subprocess

import pytest

from support.paths import clean_environment, program


@pytest.fixture(name="hccn")
def hccn_tool(tmp_path):
    tool = tmp_path / "hccn_tool"
    tool.symlink_to(program())
    conf = tmp_path / "hccn.conf"

    def call(arguments, **environment):
        done = subprocess.run([tool, *arguments.split()], capture_output=True, text=True, timeout=20,
                              env=clean_environment(PHALANX_HCCN_CONF=conf, **environment), check=False)
        return done.returncode, done.stdout, done.stderr

    call.conf = conf
    return call


def test_devices_come_from_the_file_then_the_rank_table_then_the_interfaces(hccn, tmp_path):
    status, out, _ = hccn("-i 0 -ip -g")
    assert status == 0
    assert re.fullmatch(r"ipaddr:[\d.]+\nnetmask:[\d.]+\n", out)

    table = tmp_path / "ranktable.json"
    table.write_text(json.dumps({"version": "1.0", "server_count": "2", "status": "completed", "server_list": [
        {"server_id": "127.0.0.1", "container_ip": "127.0.0.1",
         "device": [{"device_id": "0", "device_ip": "127.0.0.11", "rank_id": "0"}]},
        {"server_id": "127.0.0.2", "container_ip": "127.0.0.2",
         "device": [{"device_id": "0", "device_ip": "127.0.0.12", "rank_id": "1"},
                    {"device_id": "1", "device_ip": "127.0.0.13", "rank_id": "2"}]}]}))
    table.chmod(0o640)
    own = {"RANK_TABLE_FILE": str(table), "MIES_CONTAINER_IP": "127.0.0.2"}
    assert hccn("-i 1 -ip -g", **own) == (0, "ipaddr:127.0.0.13\nnetmask:255.0.0.0\n", "")
    assert hccn("-i 0 -ip -g", **own)[1].startswith("ipaddr:127.0.0.12\n")

    hccn.conf.write_text("address_0=127.0.0.40\nnetmask_0=255.255.255.0\n# kept\n")
    assert hccn("-i 0 -ip -g", **own) == (0, "ipaddr:127.0.0.40\nnetmask:255.255.255.0\n", "")
    status, _, errors = hccn("-i 1 -ip -g", **own)
    assert status == 4
    assert errors == "Get invalid device id.\nfound 1, this machine has 1 (0 to 0)\n"


def test_ping_speaks_as_the_tool_does(hccn):
    hccn.conf.write_text("address_0=127.0.0.1\n")
    status, out, _ = hccn("-i 0 -ping -g address 127.0.0.9 pkt 64")
    assert status == 0
    assert re.fullmatch(
        r"device 0 PING 127\.0\.0\.9\n" + "".join(rf"recv seq={i},time=\d+\.\d{{6}}ms\n" for i in range(3))
        + r"3 packets transmitted, 3 received, 0\.00% packet loss\n", out)
    assert hccn("-i 0 -ping -g address 127.0.0.9 pkt 65507")[0] == 0

    # A network that nobody answers in: RFC 5737 keeps it for documents.
    status, out, errors = hccn("-i 0 -ping -g address 192.0.2.1")
    assert status == 1
    assert "0 received, 100.00% packet loss" in out
    assert errors.startswith("Command execute failed!")


def test_settings_are_kept_in_the_file(hccn):
    hccn.conf.write_text("# a remark\naddress_0=127.0.0.1\nnetmask_0=255.0.0.0\n")
    done = (0, "Cmd executed successfully!\n", "")
    assert hccn("-i 0 -ip -s address 127.0.0.3 netmask 255.255.0.0") == done
    assert hccn("-i 0 -ip -g") == (0, "ipaddr:127.0.0.3\nnetmask:255.255.0.0\n", "")
    assert hccn("-i 0 -net_health -g") == (0, "net health status: Init\n", "")
    assert hccn("-i 0 -netdetect -s address 127.0.0.9") == done
    assert hccn("-i 0 -netdetect -g") == (0, "netdetect address: 127.0.0.9\n", "")
    assert hccn("-i 0 -net_health -g")[1] == "net health status: Success\n"
    status, _, errors = hccn("-i 0 -gateway -g")
    assert (status, errors) == (2, "Get gateway failed, because no gateway was preset there!\n")
    assert hccn("-i 0 -gateway -s gateway 127.0.0.254") == done
    assert hccn("-i 0 -gateway -g") == (0, "default gateway:127.0.0.254, Iface:lo\n", "")
    assert "# a remark" in hccn.conf.read_text()
    assert hccn.conf.stat().st_mode & 0o777 == 0o644


def test_tls_link_and_lldp(hccn):
    hccn.conf.write_text("address_0=127.0.0.1\naddress_1=192.0.2.7\n")
    line = ("dev_id:{}, tls switch[{}](0:disable, 1:enable), tls preconfigured[0](0:non-preset, 1:preset), "
            "tls alarm time threshold[60]days")
    status, out, errors = hccn("-i 0 -tls -g")
    assert status == 0
    assert out.splitlines() == [line.format(0, 0), "No certificate found, please set certs firstly!"]
    assert "interNodeTLSEnabled" in errors
    assert hccn("-i 0 -tls -s enable 1")[:2] == (0, "Cmd executed successfully!\n")
    assert hccn("-g -tls -i 0")[1].startswith(line.format(0, 1))  # the newest boards' order
    assert hccn("-i 0 -link -g") == (0, "link status: UP\n", "")
    assert hccn("-i 1 -link -g") == (0, "link status: DOWN\n", "")
    assert hccn("-a -link -g")[1] == "link status: UP\nlink status: DOWN\n"
    assert hccn("-i 0 -lldp -g")[:2] == (0, "")
    assert re.fullmatch(r"mtu:\d+\n", hccn("-i 0 -mtu -g")[1])
    status, _, errors = hccn("-i 1 -mtu -g")
    assert status == 1
    assert errors.startswith("Execute failed: Link status is down.\n")


@pytest.mark.parametrize("arguments, status, text", [
    ("", 4, "The total count of input parameters is wrong!"),
    ("-ip -g", 1, 'Get invalid major cmd type. The valid major cmd type should be "-a" or "-i".'),
    ("-i x -ip -g", 4, "Get invalid device id."),
    ("-i 0 -nothing -g", 3, "Get invalid major cmd.\nEnter [ hccn_tool -h ] for more details."),
    ("-i 0 -ip -g -s", 3, "Get unknown option!"),
    ("-i 0 -ping -g address 1.2.3", 6, "The ip address you configured is invalid!"),
    ("-i 0 -ping -g address 127.0.0.1 pkt 65508", 1, "Get invalid parameters!"),
    ("-i 0 -ping -g address", 4, "The total count of input parameters is wrong!"),
    ("-i 0 -ip -s address 192.0.2.1 netmask 255.0.0.0", 6, "The ip address you configured is invalid!"),
    ("-i 0 -tls -s enable 2", 1, "Get invalid parameters!"),
    ("-i 0 -link -s up", 3, "Get unknown option!"),
])
def test_errors_have_the_tools_words_and_status(hccn, arguments, status, text):
    hccn.conf.write_text("address_0=127.0.0.1\n")
    got, out, errors = hccn(arguments)
    assert (got, out) == (status, "")
    assert errors.startswith(text + "\n")


def test_no_address_is_said_and_not_guessed(hccn):
    hccn.conf.write_text("address_1=127.0.0.1\n")
    assert hccn("-i 0 -ip -g") == (13, "", "Get ipconf failed, because no ip was preset there!\n")
    hccn.conf.write_text("x" * 70000)
    status, _, errors = hccn("-i 0 -ip -g")
    assert status == 1
    assert "larger than 65536 bytes" in errors
