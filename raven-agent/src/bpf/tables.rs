//! Typed access to the maps that describe pools. The agent is their only writer.

use std::{collections::BTreeMap, fmt::Display, path::Path};

use aya::{
    Pod,
    maps::{Array, HashMap, LpmTrie, Map, MapData, PerCpuHashMap, lpm_trie::Key},
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use raven_common::{
    Verdict,
    mac1::Mac1Key,
    tables::{Config, Count, CounterKey, Local, Node, Remote},
};

use super::{Bpf, Error};
use crate::{
    diff::Step,
    names,
    state::{Change, State},
    topology::PublicKey,
};

/// True for a step that changes a map.
pub fn is_map_entry(step: &Step) -> bool {
    !matches!(
        step,
        Step::PutBarrier(_)
            | Step::DeleteBarrier(_)
            | Step::PutRoute(..)
            | Step::DeleteRoute(_)
            | Step::PutPeer(..)
            | Step::TakePrefixes(..)
            | Step::DeletePeer(_)
    )
}

/// Counters by gateway id and verdict, summed over CPUs.
pub type Counters = BTreeMap<(u32, Verdict), Count>;

impl Bpf {
    /// The entries of the maps that a plan describes.
    pub fn read(&mut self) -> Result<State, Error> {
        let mut remote = self.trie4::<Remote>("REMOTE4")?;
        remote.extend(self.trie6::<Remote>("REMOTE6")?);
        let mut local = self.trie4::<Local>("LOCAL4")?;
        local.extend(self.trie6::<Local>("LOCAL6")?);
        let nodes = self.entries::<[u8; 4], Node, _, _>("NODES")?;
        let nodes6 = self.entries::<[u8; 16], [u8; 4], _, _>("NODES6")?;
        let outer6 = self.entries::<[u8; 4], [u8; 16], _, _>("OUTER6")?;
        Ok(State { remote, local, nodes, nodes6, outer6, ..State::default() })
    }

    /// Runs a step that changes a map, and no other.
    pub fn apply(&mut self, step: &Step) -> Result<Change, Error> {
        match step {
            Step::PutRemote(prefix, value) => self.put(["REMOTE4", "REMOTE6"], prefix, *value)?,
            Step::PutLocal(prefix, value) => self.put(["LOCAL4", "LOCAL6"], prefix, *value)?,
            Step::DeleteRemote(prefix) => self.delete::<Remote>(["REMOTE4", "REMOTE6"], prefix)?,
            Step::DeleteLocal(prefix) => self.delete::<Local>(["LOCAL4", "LOCAL6"], prefix)?,
            Step::PutNode(outer, node) => self.put_entry("NODES", outer, outer.octets(), *node)?,
            Step::DeleteNode(outer) => self.delete_entry::<_, Node>("NODES", outer, outer.octets())?,
            Step::PutNode6(address, outer) => self.put_entry("NODES6", address, address.octets(), outer.octets())?,
            Step::DeleteNode6(address) => self.delete_entry::<_, [u8; 4]>("NODES6", address, address.octets())?,
            Step::PutOuter6(outer, address) => self.put_entry("OUTER6", outer, outer.octets(), address.octets())?,
            Step::DeleteOuter6(outer) => self.delete_entry::<_, [u8; 16]>("OUTER6", outer, outer.octets())?,
            _ => return Ok(Change::NONE),
        }
        Ok(Change::ONE)
    }

    /// The generation under which the programs cache lookups.
    pub fn generation(&mut self) -> Result<u32, Error> {
        let map: Array<_, Config> = self.map("CONFIG")?;
        Ok(map.get(&0, 0).map(|config| config.generation).unwrap_or_default())
    }

    /// Invalidates the lookups that programs have cached. Call it *after* the tables have changed: a lookup made before
    /// is cached under the previous generation.
    pub fn next_generation(&mut self) -> Result<(), Error> {
        let mut map: Array<_, Config> = self.map("CONFIG")?;
        let config = map.get(&0, 0).unwrap_or_default();
        let next = Config { generation: config.generation.wrapping_add(1), ..config };
        map.set(0, next, 0).map_err(|e| Error::Map { map: "CONFIG", reason: e.to_string() })
    }

    /// Writes the node's configuration, if it differs.
    pub fn set_config(&mut self, config: Config) -> Result<Change, Error> {
        let mut map: Array<_, Config> = self.map("CONFIG")?;
        if map.get(&0, 0).is_ok_and(|have| have == config) {
            return Ok(Change::NONE);
        }
        map.set(0, config, 0).map_err(|e| Error::Map { map: "CONFIG", reason: e.to_string() })?;
        Ok(Change::ONE)
    }

    /// Sets the public key that handshake initiations to the tunnel's port must be made for; `None`: they are not checked.
    pub fn set_handshake_key(&mut self, key: Option<&PublicKey>) -> Result<Change, Error> {
        let want = key.map(|key| Mac1Key::of(&key.0)).unwrap_or_default();
        let mut map: Array<_, Mac1Key> = self.map("MAC1_KEY")?;
        if map.get(&0, 0).is_ok_and(|have| have == want) {
            return Ok(Change::NONE);
        }
        map.set(0, want, 0).map_err(|e| Error::Map { map: "MAC1_KEY", reason: e.to_string() })?;
        Ok(Change::ONE)
    }

    pub(super) fn map<'a, T>(&'a mut self, name: &'static str) -> Result<T, Error>
    where
        T: TryFrom<&'a mut Map>,
        T::Error: Display,
    {
        let map = self.ebpf.map_mut(name).ok_or(Error::Map { map: name, reason: "not in the object".to_owned() })?;
        T::try_from(map).map_err(|e| Error::Map { map: name, reason: e.to_string() })
    }

    fn trie4<V: Pod>(&mut self, name: &'static str) -> Result<BTreeMap<IpNet, V>, Error> {
        let trie: LpmTrie<&mut MapData, [u8; 4], V> = self.map(name)?;
        let prefix = |key: Key<[u8; 4]>| Ipv4Net::new(key.data().into(), key.prefix_len() as u8).ok().map(IpNet::V4);
        Ok(trie.iter().flatten().filter_map(|(key, value)| Some((prefix(key)?, value))).collect())
    }

    fn trie6<V: Pod>(&mut self, name: &'static str) -> Result<BTreeMap<IpNet, V>, Error> {
        let trie: LpmTrie<&mut MapData, [u8; 16], V> = self.map(name)?;
        let prefix = |key: Key<[u8; 16]>| Ipv6Net::new(key.data().into(), key.prefix_len() as u8).ok().map(IpNet::V6);
        Ok(trie.iter().flatten().filter_map(|(key, value)| Some((prefix(key)?, value))).collect())
    }

    fn entries<K: Pod, V: Pod, A: From<K> + Ord, B: From<V>>(
        &mut self,
        name: &'static str,
    ) -> Result<BTreeMap<A, B>, Error> {
        let map: HashMap<&mut MapData, K, V> = self.map(name)?;
        Ok(map.iter().flatten().map(|(key, value)| (key.into(), value.into())).collect())
    }

    fn put_entry<K: Pod, V: Pod>(
        &mut self,
        name: &'static str,
        what: &dyn Display,
        key: K,
        value: V,
    ) -> Result<(), Error> {
        let mut map: HashMap<&mut MapData, K, V> = self.map(name)?;
        map.insert(key, value, 0).map_err(|e| refused(name, what, &e))
    }

    fn delete_entry<K: Pod, V: Pod>(&mut self, name: &'static str, what: &dyn Display, key: K) -> Result<(), Error> {
        let mut map: HashMap<&mut MapData, K, V> = self.map(name)?;
        map.remove(&key).map_err(|e| refused(name, what, &e))
    }

    fn put<V: Pod>(&mut self, [v4, v6]: [&'static str; 2], prefix: &IpNet, value: V) -> Result<(), Error> {
        match prefix {
            IpNet::V4(p) => {
                let mut trie: LpmTrie<&mut MapData, [u8; 4], V> = self.map(v4)?;
                trie.insert(&Key::new(p.prefix_len().into(), p.network().octets()), value, 0)
                    .map_err(|e| refused(v4, prefix, &e))
            }
            IpNet::V6(p) => {
                let mut trie: LpmTrie<&mut MapData, [u8; 16], V> = self.map(v6)?;
                trie.insert(&Key::new(p.prefix_len().into(), p.network().octets()), value, 0)
                    .map_err(|e| refused(v6, prefix, &e))
            }
        }
    }

    fn delete<V: Pod>(&mut self, [v4, v6]: [&'static str; 2], prefix: &IpNet) -> Result<(), Error> {
        match prefix {
            IpNet::V4(p) => {
                let mut trie: LpmTrie<&mut MapData, [u8; 4], V> = self.map(v4)?;
                trie.remove(&Key::new(p.prefix_len().into(), p.network().octets())).map_err(|e| refused(v4, prefix, &e))
            }
            IpNet::V6(p) => {
                let mut trie: LpmTrie<&mut MapData, [u8; 16], V> = self.map(v6)?;
                trie.remove(&Key::new(p.prefix_len().into(), p.network().octets())).map_err(|e| refused(v6, prefix, &e))
            }
        }
    }
}

fn refused(map: &'static str, entry: &dyn Display, error: &dyn Display) -> Error {
    Error::Map {
        map,
        reason: format!(
            "entry {entry}: {error} (is the map full? `bpftool map show pinned {}/maps/{map}`)",
            names::PINS
        ),
    }
}

/// Reads the counters by their pin, without a loaded object.
pub fn counters() -> Result<Counters, Error> {
    let failed = |reason: String| Error::Map { map: "COUNTERS", reason };
    let data = MapData::from_pin(Path::new(names::PINS).join("maps/COUNTERS")).map_err(|e| failed(e.to_string()))?;
    let map: PerCpuHashMap<_, CounterKey, Count> =
        Map::PerCpuHashMap(data).try_into().map_err(|e: aya::maps::MapError| failed(e.to_string()))?;
    let sum = |per_cpu: &[Count]| {
        per_cpu.iter().fold(Count::default(), |a, b| Count { packets: a.packets + b.packets, bytes: a.bytes + b.bytes })
    };
    let known = map.iter().flatten().filter_map(|(key, value)| {
        let verdict = Verdict::from_number(key.verdict)?;
        Some(((key.gateway, verdict), sum(&value)))
    });
    Ok(known.collect())
}
