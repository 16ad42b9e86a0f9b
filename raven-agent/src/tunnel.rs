//! The WireGuard driver: the kernel's module where it exists, else Raven's engine on a TUN device.
//!
//! Both are configured through `wireguard-control`, in the same way. Device, key and peers outlive the agent: the kernel
//! keeps its own, and the engine runs in a separate process ([`engine`]).

pub mod engine;
mod key;

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use ipnet::IpNet;
use netlink_packet_route::link::InfoKind;
use raven_api::key_proof;
use wireguard_control::{Device, DeviceUpdate, InterfaceName, Key, PeerConfigBuilder, PeerInfo};

pub use self::key::{load_or_create as load_or_create_key, load_preshared};
use crate::{
    config::Engine,
    link::{self, Links},
    names,
    state::{Change, Peer, Preshared},
    topology::{PresharedKey, PublicKey},
};
pub use wireguard_control::Key as PrivateKey;

/// WireGuard rejects packets of a session older than this (whitepaper §6.1, Reject-After-Time).
const SESSION_LIFE: Duration = Duration::from_secs(180);

/// A WireGuard operation failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An operation on the device failed.
    #[error(transparent)]
    Link(#[from] link::Error),
    /// The userspace engine does not start or stop.
    #[error("the userspace WireGuard engine: {0}; it needs /dev/net/tun and CAP_NET_ADMIN")]
    Engine(String),
    /// The engine's own Pod does not run.
    #[error(
        "the kernel has no WireGuard, and no engine listens on {}; look at the Pod of DaemonSet raven-wireguard on this node, or start the agent with --wireguard-engine=embedded",
        raven_engine::socket(names::TUNNEL).display()
    )]
    NoEngine,
    /// The engine in its own Pod hangs.
    #[error(
        "the WireGuard engine does not respond within {} s; if the liveness probe of its Pod (DaemonSet raven-wireguard) does not restart it, delete the Pod",
        ANSWER.as_secs()
    )]
    Unresponsive,
    /// A key file cannot be read or written.
    #[error("cannot use key file {path}: {reason}")]
    Key {
        /// Path of the file.
        path: String,
        /// The error of the file system.
        reason: std::io::Error,
    },
    /// A request to WireGuard failed.
    #[error("cannot {action}: {reason}")]
    Request {
        /// The attempted action.
        action: String,
        /// The error that WireGuard returned.
        reason: std::io::Error,
    },
    /// A peer cannot be configured because the tunnel device is missing.
    #[error(
        "cannot configure peer {0}: the tunnel device is missing; the agent retries after it has created the device"
    )]
    NoDevice(PublicKey),
}

impl Error {
    fn is_timeout(&self) -> bool {
        matches!(self, Self::Request { reason, .. } if reason.kind() == std::io::ErrorKind::TimedOut)
    }
}

/// The implementation of WireGuard on this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// The kernel's module.
    Kernel,
    /// The crate `raven-engine`, on a TUN device.
    Userspace,
}

impl Backend {
    /// Name in status and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Userspace => "userspace",
        }
    }
}

/// The tunnel device.
#[derive(Clone)]
pub struct Tunnel {
    backend: Backend,
    name: InterfaceName,
}

impl Tunnel {
    /// Ensures that the device exists and its WireGuard implementation responds.
    pub async fn ensure(links: &Links, engine: Engine) -> Result<Self, Error> {
        let tunnel = Self::of(ensure_device(links, engine).await?)?;
        if tunnel.backend == Backend::Userspace && tunnel.device().await.is_err_and(|e| e.is_timeout()) {
            if engine == Engine::External {
                return Err(Error::Unresponsive);
            }
            tracing::warn!(
                timeout_s = ANSWER.as_secs(),
                "the embedded WireGuard engine does not respond; restarting it"
            );
            engine::kill(links, names::TUNNEL).await?;
            engine::start(names::TUNNEL).await?;
        }
        Ok(tunnel)
    }

    fn of(backend: Backend) -> Result<Self, Error> {
        let name = names::TUNNEL.parse();
        let name = name.map_err(|_| Error::Engine(format!("{} is not a valid device name", names::TUNNEL)))?;
        Ok(Self { backend, name })
    }

    /// The implementation of WireGuard.
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// Sets key and port. If that fails, the device keeps its previous settings.
    pub async fn configure(&self, key: Key, port: u16) -> Result<(), Error> {
        let device = self.device().await?;
        // Setting a key ends all sessions.
        if device.private_key.as_ref() != Some(&key) {
            self.update(DeviceUpdate::new().set_private_key(key), format!("set the key of {}", self.name)).await?;
        }
        if device.listen_port == Some(port) {
            return Ok(());
        }
        let action = format!("set UDP port {port} of {} (is another program using the port?)", self.name);
        self.update(DeviceUpdate::new().set_listen_port(port), action).await
    }

    /// True if the device listens on a port.
    pub async fn has_port(&self) -> bool {
        self.device().await.is_ok_and(|device| device.listen_port.is_some_and(|port| port != 0))
    }

    /// The peers that WireGuard has.
    pub async fn peers(&self) -> Result<BTreeMap<PublicKey, Peer>, Error> {
        Ok(self.sessions().await?.into_iter().map(|(key, (peer, _))| (key, peer)).collect())
    }

    /// The peers with the age of their last handshake, read at one moment.
    pub async fn sessions(&self) -> Result<BTreeMap<PublicKey, (Peer, Option<Duration>)>, Error> {
        let peers = join_parts(self.device().await?.peers);
        Ok(peers.iter().map(|(key, info)| (*key, (Self::peer(info), age(info)))).collect())
    }

    fn peer(info: &PeerInfo) -> Peer {
        let allowed: BTreeSet<IpNet> =
            info.config.allowed_ips.iter().filter_map(|a| IpNet::new(a.address, a.cidr).ok()).collect();
        Peer {
            endpoint: info.config.endpoint,
            allowed,
            keepalive: info.config.persistent_keepalive_interval.filter(|k| *k != 0),
            // The kernel reports zeros for "none".
            preshared: info
                .config
                .preshared_key
                .as_ref()
                .map(|key| PresharedKey(bytes(key)))
                .filter(|key| key.0 != [0; 32])
                .into(),
            alive: age(info).is_some_and(|age| age < SESSION_LIFE),
        }
    }

    /// Creates a peer or changes an existing one. Surplus prefixes stay until [`Tunnel::take_prefixes`].
    pub async fn put_peer(&self, key: PublicKey, peer: &Peer, have: Option<&Peer>) -> Result<(), Error> {
        for config in updates(key, peer, have, PREFIXES) {
            self.update(DeviceUpdate::new().add_peer(config), format!("configure peer {key} of {}", self.name)).await?;
        }
        Ok(())
    }

    /// Removes prefixes from the peers that have them.
    ///
    /// Replacing a peer's list would empty it first, and packets in between would have no peer. A prefix that moves to
    /// another peer leaves the first one by that move, so the prefixes are moved to a temporary peer, which is deleted
    /// in the same update.
    pub async fn take_prefixes(&self, prefixes: &BTreeSet<IpNet>) -> Result<(), Error> {
        let temporary = Key::generate_private().get_public();
        for part in prefixes.iter().collect::<Vec<_>>().chunks(PREFIXES) {
            let update = DeviceUpdate::new()
                .add_peer(with_prefixes(PeerConfigBuilder::new(&temporary), part))
                .remove_peer_by_key(&temporary);
            self.update(update, format!("remove {} prefixes from peers of {}", part.len(), self.name)).await?;
        }
        Ok(())
    }

    /// Deletes a peer.
    pub async fn delete_peer(&self, key: PublicKey) -> Result<(), Error> {
        self.update(
            DeviceUpdate::new().remove_peer_by_key(&control_key(key)),
            format!("delete peer {key} of {}", self.name),
        )
        .await
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

/// Time since the last handshake.
fn age(info: &PeerInfo) -> Option<Duration> {
    // Zero stands for "never".
    let time = info.stats.last_handshake_time.filter(|time| *time != UNIX_EPOCH)?;
    SystemTime::now().duration_since(time).ok()
}

/// Timeout of a request to WireGuard.
const ANSWER: Duration = Duration::from_secs(10);

/// Runs a request of `wireguard-control`, which blocks: without a limit if the embedded engine hangs.
async fn blocking<T: Send + 'static>(
    action: String,
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T, Error> {
    let result = match tokio::time::timeout(ANSWER, tokio::task::spawn_blocking(work)).await {
        Ok(result) => result.unwrap_or_else(|e| Err(std::io::Error::other(e))),
        Err(late) => Err(std::io::Error::new(std::io::ErrorKind::TimedOut, late)),
    };
    result.map_err(|reason| Error::Request { action, reason })
}

/// Prefixes of one peer per request to the kernel: its netlink messages hold 8 KiB, of which an IPv6 prefix
/// takes 40 bytes.
const PREFIXES: usize = 128;

/// The requests that configure a peer, with at most `at_once` prefixes each. Prefixes that the peer has already are not
/// touched, so a packet between two requests finds its peer.
fn updates(key: PublicKey, peer: &Peer, have: Option<&Peer>, at_once: usize) -> Vec<PeerConfigBuilder> {
    let has = |prefix: &IpNet| have.is_some_and(|have| have.allowed.contains(prefix));
    let missing: Vec<&IpNet> = peer.allowed.iter().filter(|prefix| !has(prefix)).collect();
    let mut first =
        PeerConfigBuilder::new(&control_key(key)).set_persistent_keepalive_interval(peer.keepalive.unwrap_or(0));
    // WireGuard may have learned a newer endpoint since `have` was read, so an unchanged one is not set.
    if let Some(endpoint) = peer.endpoint.filter(|endpoint| have.is_none_or(|have| have.endpoint != Some(*endpoint))) {
        first = first.set_endpoint(endpoint);
    }
    first = match (peer.preshared, have.map(|have| have.preshared)) {
        (Preshared::Key(PresharedKey(key)), _) => first.set_preshared_key(key_from(key)),
        (Preshared::None, Some(Preshared::Key(_))) => first.unset_preshared_key(),
        (Preshared::None | Preshared::Keep, _) => first,
    };
    if have.is_none() {
        first = first.replace_allowed_ips();
    }
    let mut parts = missing.chunks(at_once);
    let first = with_prefixes(first, parts.next().unwrap_or_default());
    std::iter::once(first)
        .chain(parts.map(|part| with_prefixes(PeerConfigBuilder::new(&control_key(key)), part)))
        .collect()
}

fn with_prefixes(config: PeerConfigBuilder, prefixes: &[&IpNet]) -> PeerConfigBuilder {
    prefixes.iter().fold(config, |config, prefix| config.add_allowed_ip(prefix.addr(), prefix.prefix_len()))
}

/// Joins the parts of each peer. The kernel splits a peer with many prefixes into several messages, of which only the
/// first has more than key and prefixes (`uapi/linux/wireguard.h`, WG_CMD_GET_DEVICE).
fn join_parts(parts: Vec<PeerInfo>) -> BTreeMap<PublicKey, PeerInfo> {
    let mut peers: BTreeMap<PublicKey, PeerInfo> = BTreeMap::new();
    for part in parts {
        match peers.entry(public_key(&part.config.public_key)) {
            Entry::Vacant(entry) => drop(entry.insert(part)),
            Entry::Occupied(mut entry) => entry.get_mut().config.allowed_ips.extend(part.config.allowed_ips),
        }
    }
    peers
}

/// The key in the type of `wireguard-control`, which is only constructed from base64.
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

/// The public key of a private key.
pub fn public(key: &Key) -> PublicKey {
    public_key(&key.get_public())
}

/// Proof that `node` has this private key.
pub fn prove(key: &Key, node: &str) -> String {
    key_proof::prove(bytes(key), node)
}

/// Ensures that the device exists. An existing one determines the backend; otherwise the kernel's WireGuard
/// is tried first.
async fn ensure_device(links: &Links, engine: Engine) -> Result<Backend, Error> {
    match links.find(names::TUNNEL).await? {
        Some(found) if found.kind == Some(InfoKind::Wireguard) => return Ok(Backend::Kernel),
        Some(_) if engine::is_running(names::TUNNEL) => return Ok(Backend::Userspace),
        // The engine creates its device before its socket: deleting it now would end an engine that starts.
        Some(found) if found.kind == Some(InfoKind::Tun) && engine == Engine::External => return Err(Error::NoEngine),
        Some(other) => {
            tracing::warn!(
                ifname = names::TUNNEL,
                kind = other.kind_name(),
                "a device of another kind has the tunnel's name; recreating it"
            );
            links.delete_device(names::TUNNEL).await?;
        }
        None => {}
    }
    match links.add_wireguard(names::TUNNEL).await {
        Ok(()) => Ok(Backend::Kernel),
        Err(e) if e.is_unsupported() && engine == Engine::External => Err(Error::NoEngine),
        Err(e) if e.is_unsupported() => {
            tracing::info!("the kernel has no WireGuard; starting the embedded engine on a TUN device");
            engine::start(names::TUNNEL).await?;
            Ok(Backend::Userspace)
        }
        Err(e) => Err(e.into()),
    }
}

/// Fails if an engine has a socket for the device and does not answer on it.
pub async fn check_engine() -> Result<(), Error> {
    match raven_engine::socket(names::TUNNEL).exists() {
        true => Tunnel::of(Backend::Userspace)?.device().await.map(drop),
        false => Ok(()),
    }
}

/// Deletes the device, with either backend, if it exists. An external engine without peers is left alone: its Pod would
/// start the next one.
pub async fn remove(links: &Links, engine: Engine) -> Result<Change, Error> {
    let is_external = engine == Engine::External && engine::is_running(names::TUNNEL);
    if is_external && Tunnel::of(Backend::Userspace)?.peers().await?.is_empty() {
        return Ok(Change::NONE);
    }
    engine::stop(links, names::TUNNEL).await
}

#[cfg(test)]
mod tests {
    use wireguard_control::AllowedIp;

    use super::*;

    fn prefixes(range: std::ops::Range<u8>) -> BTreeSet<IpNet> {
        range.map(|n| format!("10.0.{n}.0/24").parse().expect("a prefix")).collect()
    }

    fn peer(allowed: BTreeSet<IpNet>) -> Peer {
        Peer {
            endpoint: "192.0.2.1:51820".parse().ok(),
            allowed,
            keepalive: Some(15),
            preshared: Preshared::None,
            alive: false,
        }
    }

    /// Per request: whether it replaces the prefixes, and their number.
    fn requests(updates: &[PeerConfigBuilder]) -> Vec<(bool, usize)> {
        // The builder shows the flag only in its Debug text.
        let replaces = |update: &PeerConfigBuilder| format!("{update:?}").contains("replace_allowed_ips: true");
        updates.iter().map(|u| (replaces(u), u.clone().into_peer_config().allowed_ips.len())).collect()
    }

    #[test]
    fn peer_with_many_prefixes_is_split_and_only_the_first_request_replaces() {
        let key = PublicKey([1; 32]);
        assert_eq!(
            requests(&updates(key, &peer(prefixes(0..250)), None, 100)),
            [(true, 100), (false, 100), (false, 50)]
        );
        assert_eq!(requests(&updates(key, &peer(prefixes(0..0)), None, 100)), [(true, 0)]);
    }

    #[test]
    fn unchanged_prefixes_and_endpoint_are_not_sent() {
        let key = PublicKey([1; 32]);
        let have = peer(prefixes(0..150));
        for wanted in [0..152, 1..152] {
            let updates = updates(key, &peer(prefixes(wanted)), Some(&have), 100);
            assert_eq!(requests(&updates), [(false, 2)]);
            assert_eq!(updates[0].clone().into_peer_config().endpoint, None, "WireGuard may have learned a newer one");
        }
        let moved = Peer { endpoint: "192.0.2.2:1".parse().ok(), ..have.clone() };
        let updates = updates(key, &moved, Some(&have), 100);
        assert_eq!(updates[0].clone().into_peer_config().endpoint, moved.endpoint);
    }

    #[test]
    fn parts_of_one_peer_are_joined() {
        let part = |endpoint: Option<&str>, last: u8| {
            let mut part = PeerInfo::from_public_key(control_key(PublicKey([1; 32])));
            part.config.endpoint = endpoint.and_then(|text| text.parse().ok());
            part.config.persistent_keepalive_interval = endpoint.map(|_| 15);
            part.config.allowed_ips.push(AllowedIp { address: [10, 0, last, 0].into(), cidr: 24 });
            part.stats.last_handshake_time = endpoint.map(|_| SystemTime::now());
            part
        };
        let peers = join_parts(vec![part(Some("192.0.2.1:51820"), 1), part(None, 2), part(None, 3)]);
        let seen = Tunnel::peer(&peers[&PublicKey([1; 32])]);
        assert_eq!(peers.len(), 1);
        assert_eq!(seen, Peer { alive: true, ..peer(prefixes(1..4)) });
    }
}
