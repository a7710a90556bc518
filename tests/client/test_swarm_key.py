"""A swarm's key in the hands of a program: read at once, shown and saved nowhere."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest

from petalnet.client.auto import AutoDistributedConfig
from petalnet.client.settings import ClientSettings
from petalnet.client.swarm import Swarm
from petalnet.errors import UsageError
from petalnet.models.checkpoint import DEMO_MODEL
from petalnet.p2p.access import Access
from petalnet.p2p.swarm_key import SwarmKey

PEER = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWRyoDGGEaWkXLRD5VMkEaMrxCqNQw9fbWxwVa9R3oWBVy"


def test_a_key_of_a_configuration_is_neither_shown_nor_saved(tmp_path: Path) -> None:
    key = SwarmKey.generate()
    secret = key.text().splitlines()[1]
    config = AutoDistributedConfig.from_pretrained(str(DEMO_MODEL), initial_peers=[PEER], swarm_key=key.text())
    assert config.swarm_key == key and copy.deepcopy(config).swarm_key == key
    config.save_pretrained(tmp_path / "saved")
    saved = "".join(path.read_text() for path in (tmp_path / "saved").iterdir())
    for text in (repr(config), str(config), str(config.to_dict()), config.to_json_string(), repr(vars(config)), saved):
        assert secret not in text
    assert secret not in repr(ClientSettings(swarm_key=key.text()))


def test_a_pickled_configuration_says_where_the_key_lies(tmp_path: Path) -> None:
    key, path = SwarmKey.generate(), tmp_path / "swarm.key"
    key.save_new(path)
    config = AutoDistributedConfig.from_pretrained(str(DEMO_MODEL), swarm_key=path)
    data = pickle.dumps(config.swarm_key)
    assert pickle.loads(data) == key and key.text().splitlines()[1].encode() not in data
    with pytest.raises(TypeError, match="give the path of its file"):
        pickle.dumps(ClientSettings(swarm_key=key.text()).swarm_key)


def test_a_wrong_key_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the swarm key"):
        ClientSettings(swarm_key=str(tmp_path / "none.key"))
    assert ClientSettings(swarm_key="none").swarm_key == "none"  # an open swarm, whatever the configuration says


def test_models_share_a_connection_where_peers_and_keys_are_the_same() -> None:
    key, other = SwarmKey.generate(), SwarmKey.generate()
    swarms = [Swarm([PEER], Access(swarm_key=used)) for used in (key, SwarmKey(key._secret), other, None)]
    try:
        joined = [swarm._joined for swarm in swarms]
        assert joined[0] is joined[1] and len({id(one) for one in joined}) == 3
    finally:
        for swarm in swarms:
            swarm.close()
