//! The `kubelet_lookup` program, which hands connections to kubelets of edge nodes to the proxy: attached to the
//! network namespace, pinned, with its maps.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    net::{IpAddr, Ipv4Addr},
    os::fd::AsRawFd,
    path::PathBuf,
};

use aya::{
    Pod,
    maps::{HashMap, LpmTrie, MapData, SockMap, lpm_trie::Key},
    programs::{
        SkLookup,
        links::{FdLink, PinnedLink},
    },
};
use raven_common::tables::{KubeletAddress, KubeletNode, Remote};

use super::{
    Action, Bpf, Error,
    attach::{chain, tag_of},
};
use crate::state::{Change, Intercepted, Interception};

const PROGRAM: &str = "kubelet_lookup";

fn failed(action: Action) -> impl Fn(String) -> Error {
    move |reason| Error::Program { action, program: PROGRAM, place: String::new(), reason }
}

impl Bpf {
    /// Ensures that the program is attached and hands connections to `listener`.
    pub fn intercept(&mut self, listener: &impl AsRawFd) -> Result<Change, Error> {
        let failed = failed(Action::Attach);
        let mut proxy: SockMap<_> = self.map("PROXY")?;
        // Storing the same socket again has no effect. The entry of an earlier agent was removed when
        // its socket closed.
        proxy.set(0, listener, 0).map_err(|e| Error::Map { map: "PROXY", reason: chain(&e) })?;
        let pin = self.lookup_pin();
        let loaded = self.loaded.insert(PROGRAM);
        let program: &mut SkLookup = self
            .ebpf
            .program_mut(PROGRAM)
            .ok_or_else(|| failed("not in the object".to_owned()))?
            .try_into()
            .map_err(|e| failed(chain(&e)))?;
        if loaded && let Err(e) = program.load() {
            self.loaded.remove(PROGRAM);
            return Err(self::failed(Action::Load)(chain(&e)));
        }
        let ours = program.info().map_err(|e| failed(chain(&e)))?.tag();
        let running = PinnedLink::from_pin(&pin)
            .ok()
            .and_then(|link| FdLink::from(link).info().ok())
            .and_then(|info| tag_of(info.program_id()));
        if running == Some(ours) {
            return Ok(Change::NONE);
        }
        // For a moment both versions are attached; they use the same maps.
        let namespace = File::open("/proc/thread-self/ns/net").map_err(|e| failed(e.to_string()))?;
        let id = program.attach(&namespace).map_err(|e| failed(chain(&e)))?;
        let link = FdLink::from(program.take_link(id).map_err(|e| failed(chain(&e)))?);
        let _ = fs::remove_file(&pin);
        link.pin(&pin).map_err(|e| failed(format!("cannot pin the link at {}: {}", pin.display(), chain(&e))))?;
        Ok(Change::ONE)
    }

    /// Detaches the program, if it is attached.
    pub fn stop_intercepting(&mut self) -> Result<Change, Error> {
        match fs::remove_file(self.lookup_pin()) {
            Ok(()) => Ok(Change::ONE),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Change::NONE),
            Err(e) => Err(failed(Action::Detach)(e.to_string())),
        }
    }

    /// Brings maps `KUBELETS` and `KUBELETS6` to the addresses and ports of `want`; `None` empties them.
    pub fn set_kubelets(&mut self, want: Option<&Interception>) -> Result<Change, Error> {
        let change = self.set_kubelets_of("KUBELETS", want, |address| match address {
            IpAddr::V4(address) => Some(address.octets()),
            IpAddr::V6(_) => None,
        })?;
        let change6 = self.set_kubelets_of("KUBELETS6", want, |address| match address {
            IpAddr::V6(address) => Some(address.octets()),
            IpAddr::V4(_) => None,
        })?;
        Ok([change, change6].into_iter().sum())
    }

    /// `bytes`: an address as the map has it; `None` if it is of the other family.
    fn set_kubelets_of<A: Ord>(
        &mut self,
        name: &'static str,
        want: Option<&Interception>,
        bytes: impl Fn(&IpAddr) -> Option<A>,
    ) -> Result<Change, Error>
    where
        KubeletAddress<A>: Pod + Ord,
    {
        let mut map: HashMap<_, KubeletAddress<A>, KubeletNode> = self.map(name)?;
        let refused = |e: aya::maps::MapError| Error::Map { map: name, reason: chain(&e) };
        let of_family =
            |((address, port), node)| Some((KubeletAddress { address: bytes(address)?, port, _pad: 0 }, node));
        let want: BTreeMap<KubeletAddress<A>, KubeletNode> =
            want.into_iter().flat_map(kubelets).filter_map(of_family).collect();
        let have: BTreeMap<KubeletAddress<A>, KubeletNode> = map.iter().flatten().collect();
        let mut change = Change::NONE;
        for (address, node) in want.iter().filter(|(address, node)| have.get(address) != Some(node)) {
            map.insert(address, node, 0).map_err(refused)?;
            change += Change::ONE;
        }
        for address in have.keys().collect::<BTreeSet<_>>().difference(&want.keys().collect()) {
            map.remove(address).map_err(refused)?;
            change += Change::ONE;
        }
        Ok(change)
    }

    /// The outer address of the gateway node that intercepted connections go to at present, by the maps.
    pub fn intercepting_gateway(&mut self) -> Option<Ipv4Addr> {
        let via = self
            .via_of::<[u8; 4]>("KUBELETS", "REMOTE4", 32)
            .or_else(|| self.via_of::<[u8; 16]>("KUBELETS6", "REMOTE6", 128))?;
        (via != [0; 4]).then(|| via.into())
    }

    /// `via` of the first intercepted address.
    fn via_of<A: Pod>(&mut self, kubelets: &'static str, remote: &'static str, bits: u32) -> Option<[u8; 4]>
    where
        KubeletAddress<A>: Pod,
    {
        let kubelets: HashMap<&mut MapData, KubeletAddress<A>, KubeletNode> = self.map(kubelets).ok()?;
        let (kubelet, _) = kubelets.iter().flatten().next()?;
        let remote: LpmTrie<&mut MapData, A, Remote> = self.map(remote).ok()?;
        Some(remote.get(&Key::new(bits, kubelet.address), 0).ok()?.via)
    }

    fn lookup_pin(&self) -> PathBuf {
        self.pins.join("links").join(PROGRAM)
    }
}

/// Addresses and ports, with the names of their nodes.
fn kubelets(interception: &Interception) -> impl Iterator<Item = ((&IpAddr, u16), KubeletNode)> {
    [&interception.kubelets, &interception.proxies].into_iter().flat_map(|Intercepted { nodes, ports }| {
        nodes.iter().flat_map(|(address, name)| {
            ports.iter().map(move |port| ((address, *port), KubeletNode { node: fixed(name) }))
        })
    })
}

/// The name, truncated to the field and padded with zeros.
fn fixed(name: &str) -> [u8; 64] {
    let mut bytes = [0; 64];
    let length = name.len().min(bytes.len());
    bytes[..length].copy_from_slice(&name.as_bytes()[..length]);
    bytes
}
