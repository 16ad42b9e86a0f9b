//! The driver of WireGuard: in the kernel where it has it, else the embedded engine on a TUN device. Chosen by itself.
//!
//! Both are spoken to through `wireguard-control`; what differs between them is said where it matters. The device, its key
//! and its peers outlive the agent: the kernel keeps its own, and the engine is a process of its own ([`engine`]).

pub mod engine;
mod key;

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    net::{Ipv4Addr, Ipv6Addr, UdpSocket},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use ipnet::IpNet;
use netlink_packet_route::link::InfoKind;
use wireguard_control::{Device, DeviceUpdate, InterfaceName, Key, PeerConfigBuilder, PeerInfo};

pub use self::key::{load_or_make as load_or_make_key, load_preshared};
use crate::{
    diff::Peer,
    link::{self, Links},
    names,
    topology::{PresharedKey, PublicKey},
};

/// A session that is older than this is dead: WireGuard rejects it (whitepaper §6.1, Reject-After-Time).
const SESSION_LIFE: Duration = Duration::from_secs(180);

/// What can go wrong with the tunnel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The device.
    #[error(transparent)]
    Link(#[from] link::Error),
    /// The embedded engine did not come up.
    #[error("start the embedded WireGuard engine: {0} (is /dev/net/tun there, and may the agent use it?)")]
    Engine(String),
    /// The key file.
    #[error("WireGuard key {path}: {reason}")]
    Key {
        /// The file.
        path: String,
        /// Why.
        reason: String,
    },
    /// A request to WireGuard.
    #[error("{action}: {source}")]
    Request {
        /// What was tried.
        action: String,
        /// Why not.
        source: std::io::Error,
    },
}

impl Error {
    /// Nobody answered in time.
    fn is_silence(&self) -> bool {
        matches!(self, Self::Request { source, .. } if source.kind() == std::io::ErrorKind::TimedOut)
    }
}

/// Who does WireGuard on this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// The kernel's module.
    Kernel,
    /// boringtun, on a TUN device.
    Userspace,
}

impl Backend {
    /// As status and logs have it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Userspace => "userspace",
        }
    }
}

/// The device, ready to take peers.
#[derive(Clone)]
pub struct Tunnel {
    backend: Backend,
    name: InterfaceName,
}

impl Tunnel {
    /// Sees to it that the device is there, and somebody who answers for it.
    pub async fn ensure(links: &Links) -> Result<Self, Error> {
        let backend = ensure_device(links).await?;
        let name: InterfaceName = names::TUNNEL.parse().map_err(|_| Error::Engine(format!("{} is no device name", names::TUNNEL)))?;
        let tunnel = Self { backend, name };
        if backend == Backend::Userspace && tunnel.device().await.is_err_and(|e| e.is_silence()) {
            tracing::warn!("the embedded WireGuard engine has not answered for {ANSWER:?}: starting it anew");
            engine::kill(names::TUNNEL).await?;
            engine::start(names::TUNNEL).await?;
        }
        Ok(tunnel)
    }

    /// Who does WireGuard here.
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// Gives it its key and its port. Should that fail, what it has goes on working.
    pub async fn configure(&self, key: Key, port: u16) -> Result<(), Error> {
        let device = self.device().await?;
        // The engine does not tell its key; setting the one that it has is nothing to it. The kernel's is compared:
        // setting it anew would drop all sessions.
        if self.backend == Backend::Userspace || device.private_key.as_ref() != Some(&key) {
            self.update(DeviceUpdate::new().set_private_key(key), format!("set the key of {}", self.name)).await?;
        }
        if device.listen_port == Some(port) {
            return Ok(());
        }
        let action = format!("set UDP port {port} of {} (is another program using the port?)", self.name);
        // The engine gives its old port up before it asks for the new one; the kernel after it has it.
        if self.backend == Backend::Userspace && is_taken(port) {
            return Err(Error::Request { action, source: std::io::ErrorKind::AddrInUse.into() });
        }
        self.update(DeviceUpdate::new().set_listen_port(port), action).await
    }

    /// Whether it has a port to receive by.
    pub async fn has_port(&self) -> bool {
        self.device().await.is_ok_and(|device| device.listen_port.is_some_and(|port| port != 0))
    }

    /// The peers as WireGuard has them.
    pub async fn peers(&self) -> Result<BTreeMap<PublicKey, Peer>, Error> {
        Ok(self.sessions().await?.into_iter().map(|(key, (peer, _))| (key, peer)).collect())
    }

    /// The same with the age of each peer's last handshake, of one moment.
    pub async fn sessions(&self) -> Result<BTreeMap<PublicKey, (Peer, Option<Duration>)>, Error> {
        let peers = whole(self.device().await?.peers);
        Ok(peers.iter().map(|(key, info)| (*key, (self.peer(info), self.age(info)))).collect())
    }

    fn peer(&self, info: &PeerInfo) -> Peer {
        let allowed: BTreeSet<IpNet> = info.config.allowed_ips.iter().filter_map(|a| IpNet::new(a.address, a.cidr).ok()).collect();
        Peer {
            endpoint: info.config.endpoint,
            allowed,
            keepalive: info.config.persistent_keepalive_interval.filter(|k| *k != 0),
            // The kernel says "none" by zeros.
            preshared: info.config.preshared_key.as_ref().map(|key| PresharedKey(bytes(key))).filter(|key| key.0 != [0; 32]),
            alive: self.age(info).is_some_and(|age| age < SESSION_LIFE),
        }
    }

    /// How long ago the last handshake was.
    fn age(&self, info: &PeerInfo) -> Option<Duration> {
        let time = info.stats.last_handshake_time?;
        match self.backend {
            Backend::Kernel => SystemTime::now().duration_since(time).ok(),
            // boringtun reports the age itself where the protocol has the time; wireguard-control takes it for a time.
            Backend::Userspace => time.duration_since(UNIX_EPOCH).ok(),
        }
    }

    /// Makes a peer, or changes the one that is there; what it has too much the kernel leaves it until [`Tunnel::take`].
    pub async fn put_peer(&self, key: PublicKey, peer: &Peer, have: Option<&Peer>) -> Result<(), Error> {
        let updates = match self.backend {
            Backend::Kernel => updates(key, peer, have, PREFIXES),
            Backend::Userspace => {
                // boringtun cannot change a peer (it panics): remove it first, and say all in one. The session is made anew with the
                // next packet; the endpoint that was learned is in `peer`.
                if have.is_some() {
                    self.delete_peer(key).await?;
                }
                updates(key, peer, None, usize::MAX)
            }
        };
        for config in updates {
            self.update(DeviceUpdate::new().add_peer(config), format!("put peer {key} into {}", self.name)).await?;
        }
        Ok(())
    }

    /// Takes prefixes away from whichever peer has them. The kernel would empty a peer before it fills it anew, and packets that come in
    /// between have no peer; a prefix that another peer gets leaves its old one by that alone. So a peer gets these that nobody is, and
    /// goes with them.
    pub async fn take(&self, prefixes: &BTreeSet<IpNet>) -> Result<(), Error> {
        // The engine was told the whole peer.
        if self.backend == Backend::Userspace {
            return Ok(());
        }
        let nobody = Key::generate_private().get_public();
        for part in prefixes.iter().collect::<Vec<_>>().chunks(PREFIXES) {
            let update = DeviceUpdate::new().add_peer(with_prefixes(PeerConfigBuilder::new(&nobody), part)).remove_peer_by_key(&nobody);
            self.update(update, format!("take {} prefixes away from a peer of {}", part.len(), self.name)).await?;
        }
        Ok(())
    }

    /// Makes a handshake with a peer that we dial happen now: the first one, or one with a peer that is dead. The kernel does so by itself when a keepalive is set;
    /// boringtun waits for a packet, or for the keepalive's whole interval: a packet to nobody's port it shall have.
    pub fn poke(&self, peer: &Peer) {
        let target = peer.allowed.first().filter(|_| self.backend == Backend::Userspace && peer.endpoint.is_some());
        let Some(target) = target.map(IpNet::network) else { return };
        let any = if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        // Port 9 is `discard`. Should it fail, the keepalive does the same a little later.
        let _ = UdpSocket::bind(any).and_then(|socket| socket.send_to(&[], (target, 9)));
    }

    /// Removes a peer.
    pub async fn delete_peer(&self, key: PublicKey) -> Result<(), Error> {
        self.update(DeviceUpdate::new().remove_peer_by_key(&control_key(key)), format!("remove a peer from {}", self.name)).await
    }

    fn control(&self) -> wireguard_control::Backend {
        match self.backend {
            Backend::Kernel => wireguard_control::Backend::Kernel,
            Backend::Userspace => wireguard_control::Backend::Userspace,
        }
    }

    async fn device(&self) -> Result<Device, Error> {
        let (name, backend) = (self.name, self.control());
        blocking(format!("read device {name}"), move || Device::get(&name, backend)).await
    }

    async fn update(&self, update: DeviceUpdate, action: String) -> Result<(), Error> {
        let (name, backend) = (self.name, self.control());
        blocking(action, move || update.apply(&name, backend)).await
    }
}

fn is_taken(port: u16) -> bool {
    let in_use = |bound: std::io::Result<_>| bound.is_err_and(|e: std::io::Error| e.kind() == std::io::ErrorKind::AddrInUse);
    in_use(UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).map(drop)) || in_use(UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port)).map(drop))
}

/// How long WireGuard may take for an answer.
const ANSWER: Duration = Duration::from_secs(10);

/// `wireguard-control` blocks, for ever where the embedded engine hangs.
async fn blocking<T: Send + 'static>(action: String, work: impl FnOnce() -> std::io::Result<T> + Send + 'static) -> Result<T, Error> {
    let result = match tokio::time::timeout(ANSWER, tokio::task::spawn_blocking(work)).await {
        Ok(result) => result.unwrap_or_else(|e| Err(std::io::Error::other(e))),
        Err(late) => Err(std::io::Error::new(std::io::ErrorKind::TimedOut, late)),
    };
    result.map_err(|source| Error::Request { action, source })
}

/// Prefixes of one peer that fit into a request to the kernel, whose netlink messages have 8 KiB: an IPv6 one takes 40 bytes.
const PREFIXES: usize = 128;

/// The requests that make a peer what it should be, so many prefixes in each. What one has already stays: a packet that comes in the middle
/// finds its peer.
fn updates(key: PublicKey, peer: &Peer, have: Option<&Peer>, at_once: usize) -> Vec<PeerConfigBuilder> {
    let has = |prefix: &IpNet| have.is_some_and(|have| have.allowed.contains(prefix));
    let missing: Vec<&IpNet> = peer.allowed.iter().filter(|prefix| !has(prefix)).collect();
    let mut first = PeerConfigBuilder::new(&control_key(key)).set_persistent_keepalive_interval(peer.keepalive.unwrap_or(0));
    // Where it was heard last meanwhile is newer than what was read.
    if let Some(endpoint) = peer.endpoint.filter(|endpoint| have.is_none_or(|have| have.endpoint != Some(*endpoint))) {
        first = first.set_endpoint(endpoint);
    }
    first = match (peer.preshared, have.and_then(|have| have.preshared)) {
        (Some(PresharedKey(key)), _) => first.set_preshared_key(key_from(key)),
        (None, Some(_)) => first.unset_preshared_key(),
        (None, None) => first,
    };
    if have.is_none() {
        first = first.replace_allowed_ips();
    }
    let mut parts = missing.chunks(at_once);
    let first = with_prefixes(first, parts.next().unwrap_or_default());
    std::iter::once(first).chain(parts.map(|part| with_prefixes(PeerConfigBuilder::new(&control_key(key)), part))).collect()
}

fn with_prefixes(config: PeerConfigBuilder, prefixes: &[&IpNet]) -> PeerConfigBuilder {
    prefixes.iter().fold(config, |config, prefix| config.add_allowed_ip(prefix.addr(), prefix.prefix_len()))
}

/// The kernel tells a peer with many prefixes in several parts, of which the first alone says more than the key (`uapi/linux/wireguard.h`,
/// WG_CMD_GET_DEVICE).
fn whole(parts: Vec<PeerInfo>) -> BTreeMap<PublicKey, PeerInfo> {
    let mut peers: BTreeMap<PublicKey, PeerInfo> = BTreeMap::new();
    for part in parts {
        match peers.entry(public_key(&part.config.public_key)) {
            Entry::Vacant(entry) => drop(entry.insert(part)),
            Entry::Occupied(mut entry) => entry.get_mut().config.allowed_ips.extend(part.config.allowed_ips),
        }
    }
    peers
}

/// A key as `wireguard-control` has it, which takes one only as text.
fn control_key(key: PublicKey) -> Key {
    key_from(key.0)
}

fn key_from(bytes: [u8; 32]) -> Key {
    Key::from_base64(&STANDARD.encode(bytes)).expect("base64 of 32 bytes is a key")
}

fn public_key(key: &Key) -> PublicKey {
    PublicKey(bytes(key))
}

fn bytes(key: &Key) -> [u8; 32] {
    let mut bytes = [0; 32];
    bytes.copy_from_slice(key.as_bytes());
    bytes
}

/// The public half.
pub fn public(key: &Key) -> PublicKey {
    public_key(&key.get_public())
}

/// The device that is there decides; where there is none, the kernel is asked first.
async fn ensure_device(links: &Links) -> Result<Backend, Error> {
    match links.find(names::TUNNEL).await? {
        Some(found) if found.kind == Some(InfoKind::Wireguard) => return Ok(Backend::Kernel),
        Some(_) if engine::is_running(names::TUNNEL) => return Ok(Backend::Userspace),
        Some(other) => {
            tracing::warn!(ifname = names::TUNNEL, kind = ?other.kind, "a device of this name belongs to no WireGuard; making it anew");
            links.delete_device(names::TUNNEL).await?;
        }
        None => {}
    }
    match links.add_wireguard(names::TUNNEL).await {
        Ok(()) => Ok(Backend::Kernel),
        Err(e) if e.is_unsupported() => {
            tracing::info!("this kernel has no WireGuard: starting the embedded engine on a TUN device");
            engine::start(names::TUNNEL).await?;
            Ok(Backend::Userspace)
        }
        Err(e) => Err(e.into()),
    }
}

/// Takes the device away, whoever does WireGuard; true if it was there.
pub async fn remove(links: &Links) -> Result<bool, Error> {
    if engine::is_running(names::TUNNEL) {
        engine::stop(names::TUNNEL).await?;
        return Ok(true);
    }
    Ok(links.delete_device(names::TUNNEL).await?)
}

#[cfg(test)]
mod tests {
    use wireguard_control::AllowedIp;

    use super::*;

    fn prefixes(range: std::ops::Range<u8>) -> BTreeSet<IpNet> {
        range.map(|n| format!("10.0.{n}.0/24").parse().expect("a prefix")).collect()
    }

    fn peer(allowed: BTreeSet<IpNet>) -> Peer {
        Peer { endpoint: "192.0.2.1:51820".parse().ok(), allowed, keepalive: Some(15), preshared: None, alive: false }
    }

    fn told(updates: &[PeerConfigBuilder]) -> Vec<(bool, usize)> {
        // Whether it replaces shows in the builder's text alone.
        let replaces = |update: &PeerConfigBuilder| format!("{update:?}").contains("replace_allowed_ips: true");
        updates.iter().map(|u| (replaces(u), u.clone().into_peer_config().allowed_ips.len())).collect()
    }

    #[test]
    fn a_peer_with_many_prefixes_is_told_in_parts_and_only_the_first_replaces() {
        let key = PublicKey([1; 32]);
        assert_eq!(told(&updates(key, &peer(prefixes(0..250)), None, 100)), [(true, 100), (false, 100), (false, 50)]);
        assert_eq!(told(&updates(key, &peer(prefixes(0..0)), None, 100)), [(true, 0)]);
    }

    #[test]
    fn what_a_peer_has_already_stays_untouched() {
        let key = PublicKey([1; 32]);
        let have = peer(prefixes(0..150));
        for wanted in [0..152, 1..152] {
            let updates = updates(key, &peer(prefixes(wanted)), Some(&have), 100);
            assert_eq!(told(&updates), [(false, 2)]);
            assert_eq!(updates[0].clone().into_peer_config().endpoint, None, "WireGuard knows better where it is");
        }
        let moved = Peer { endpoint: "192.0.2.2:1".parse().ok(), ..have.clone() };
        let updates = updates(key, &moved, Some(&have), 100);
        assert_eq!(updates[0].clone().into_peer_config().endpoint, moved.endpoint);
    }

    #[test]
    fn a_peer_that_the_kernel_tells_in_parts_is_one() {
        let part = |endpoint: Option<&str>, last: u8| {
            let mut part = PeerInfo::from_public_key(control_key(PublicKey([1; 32])));
            part.config.endpoint = endpoint.and_then(|text| text.parse().ok());
            part.config.persistent_keepalive_interval = endpoint.map(|_| 15);
            part.config.allowed_ips.push(AllowedIp { address: [10, 0, last, 0].into(), cidr: 24 });
            part.stats.last_handshake_time = endpoint.map(|_| SystemTime::now());
            part
        };
        let peers = whole(vec![part(Some("192.0.2.1:51820"), 1), part(None, 2), part(None, 3)]);
        let tunnel = Tunnel { backend: Backend::Kernel, name: "wg0".parse().expect("a name") };
        let seen = tunnel.peer(&peers[&PublicKey([1; 32])]);
        assert_eq!(peers.len(), 1);
        assert_eq!(seen, Peer { alive: true, ..peer(prefixes(1..4)) });
    }
}
