//! The program that takes connections to kubelets of other pools: attached to the network namespace, pinned, its two maps.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    net::Ipv4Addr,
    os::fd::AsRawFd,
    path::PathBuf,
};

use aya::{
    maps::{HashMap, LpmTrie, MapData, SockMap, lpm_trie::Key},
    programs::{
        SkLookup,
        links::{FdLink, PinnedLink},
    },
};
use raven_common::tables::{KubeletAddress, KubeletNode, Remote};

use super::{Bpf, Error, attach::chain, attach::tag_of};

const PROGRAM: &str = "kubelet_lookup";

impl Bpf {
    /// Sees to it that the program runs and hands connections to `listener`. True: something was changed.
    pub fn intercept(&mut self, listener: &impl AsRawFd) -> Result<bool, Error> {
        let failed = |reason: String| Error::Program { action: "attach", program: PROGRAM, place: String::new(), reason };
        let mut proxy: SockMap<_> = self.map("PROXY")?;
        // The same again is no change; an earlier agent's went with it.
        proxy.set(0, listener, 0).map_err(|e| Error::Map { map: "PROXY", reason: chain(&e) })?;
        let pin = self.lookup_pin();
        let loaded = self.loaded.insert(PROGRAM);
        let program: &mut SkLookup = self
            .ebpf
            .program_mut(PROGRAM)
            .ok_or_else(|| failed("not in the object".to_owned()))?
            .try_into()
            .map_err(|e| failed(chain(&e)))?;
        if loaded {
            program.load().map_err(|e| Error::Program { action: "load", program: PROGRAM, place: String::new(), reason: chain(&e) })?;
        }
        let ours = program.info().map_err(|e| failed(chain(&e)))?.tag();
        let running =
            PinnedLink::from_pin(&pin).ok().and_then(|link| FdLink::from(link).info().ok()).and_then(|info| tag_of(info.program_id()));
        if running == Some(ours) {
            return Ok(false);
        }
        // Beside another version for a moment: both know the same maps.
        let namespace = File::open("/proc/thread-self/ns/net").map_err(|e| failed(e.to_string()))?;
        let id = program.attach(&namespace).map_err(|e| failed(chain(&e)))?;
        let link = FdLink::from(program.take_link(id).map_err(|e| failed(chain(&e)))?);
        let _ = fs::remove_file(&pin);
        link.pin(&pin).map_err(|e| failed(format!("pin the link at {}: {}", pin.display(), chain(&e))))?;
        Ok(true)
    }

    /// Takes the program away. True: it was there.
    pub fn intercept_nothing(&mut self) -> Result<bool, Error> {
        let failed = |e: std::io::Error| Error::Program { action: "detach", program: PROGRAM, place: String::new(), reason: e.to_string() };
        match fs::remove_file(self.lookup_pin()) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(failed(e)),
        }
    }

    /// Brings the addresses to what they should be; gives how many were changed.
    pub fn set_kubelets(&mut self, want: &BTreeMap<KubeletAddress, String>) -> Result<usize, Error> {
        let mut map: HashMap<_, KubeletAddress, KubeletNode> = self.map("KUBELETS")?;
        let refused = |e: aya::maps::MapError| Error::Map { map: "KUBELETS", reason: chain(&e) };
        let have: BTreeMap<KubeletAddress, KubeletNode> = map.iter().flatten().collect();
        let mut changed = 0;
        for (address, name) in want {
            let node = KubeletNode { node: fixed(name) };
            if have.get(address) != Some(&node) {
                map.insert(address, node, 0).map_err(refused)?;
                changed += 1;
            }
        }
        for address in have.keys().collect::<BTreeSet<_>>().difference(&want.keys().collect()) {
            map.remove(address).map_err(refused)?;
            changed += 1;
        }
        Ok(changed)
    }

    /// The node to which the overlay brings connections to kubelets, as the tables have it.
    pub fn detour(&mut self) -> Option<Ipv4Addr> {
        let kubelets: HashMap<&mut MapData, KubeletAddress, KubeletNode> = self.map("KUBELETS").ok()?;
        let (kubelet, _) = kubelets.iter().flatten().next()?;
        let remote: LpmTrie<&mut MapData, [u8; 4], Remote> = self.map("REMOTE4").ok()?;
        let via = remote.get(&Key::new(32, kubelet.address), 0).ok()?.via;
        (via != [0; 4]).then(|| via.into())
    }

    fn lookup_pin(&self) -> PathBuf {
        self.pins.join("links").join(PROGRAM)
    }
}

/// Cut to fit, zeros behind it.
fn fixed(name: &str) -> [u8; 64] {
    let mut bytes = [0; 64];
    let length = name.len().min(bytes.len());
    bytes[..length].copy_from_slice(&name.as_bytes()[..length]);
    bytes
}
