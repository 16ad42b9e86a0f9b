//! The driver of WireGuard: in the kernel where it has it, else the embedded engine on a TUN device. Chosen by itself.
//!
//! Both are spoken to through `wireguard-control`; what differs between them is said where it matters. The device, its key
//! and its peers outlive the agent: the kernel keeps its own, and the engine is a process of its own ([`engine`]).

pub mod engine;
mod key;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use ipnet::IpNet;
use netlink_packet_route::link::InfoKind;
use wireguard_control::{Device, DeviceUpdate, InterfaceName, Key, PeerConfigBuilder, PeerInfo};

pub use self::key::load_or_make as load_or_make_key;
use crate::{
    diff::Peer,
    link::{self, Links},
    names, plan,
    topology::PublicKey,
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
    /// Sees to it that the device is there, with key, port and MTU; gives its index and public key as well.
    pub async fn ensure(links: &Links, want: &plan::Tunnel, key: &Key) -> Result<(Self, u32), Error> {
        let backend = ensure_device(links).await?;
        let name: InterfaceName = names::TUNNEL.parse().map_err(|_| Error::Engine(format!("{} is no device name", names::TUNNEL)))?;
        let tunnel = Self { backend, name };
        tunnel.configure(key.clone(), want.port).await?;
        let index = links.ensure_up(names::TUNNEL, want.mtu).await?;
        Ok((tunnel, index))
    }

    /// Who does WireGuard here.
    pub fn backend(&self) -> Backend {
        self.backend
    }

    async fn configure(&self, key: Key, port: u16) -> Result<(), Error> {
        let device = self.device().await?;
        // The engine does not tell its key; setting the one that it has is nothing to it. The kernel's is compared:
        // setting it anew would drop all sessions.
        let same_key = self.backend == Backend::Kernel && device.private_key.as_ref() == Some(&key);
        let mut update = DeviceUpdate::new();
        if !same_key {
            update = update.set_private_key(key);
        }
        if device.listen_port != Some(port) {
            update = update.set_listen_port(port);
        } else if same_key {
            return Ok(());
        }
        self.update(update, format!("set key and UDP port {port} of {} (is another program using the port?)", self.name)).await
    }

    /// The peers as WireGuard has them.
    pub async fn peers(&self) -> Result<BTreeMap<PublicKey, Peer>, Error> {
        let device = self.device().await?;
        Ok(device.peers.iter().map(|info| (public_key(&info.config.public_key), self.peer(info))).collect())
    }

    /// The same with the age of each peer's last handshake, of one moment.
    pub async fn sessions(&self) -> Result<BTreeMap<PublicKey, (Peer, Option<Duration>)>, Error> {
        let device = self.device().await?;
        Ok(device.peers.iter().map(|info| (public_key(&info.config.public_key), (self.peer(info), self.age(info)))).collect())
    }

    fn peer(&self, info: &PeerInfo) -> Peer {
        let allowed: BTreeSet<IpNet> = info.config.allowed_ips.iter().filter_map(|a| IpNet::new(a.address, a.cidr).ok()).collect();
        Peer {
            endpoint: info.config.endpoint,
            allowed,
            keepalive: info.config.persistent_keepalive_interval.filter(|k| *k != 0),
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

    /// Makes or replaces a peer.
    pub async fn put_peer(&self, key: PublicKey, peer: &Peer, exists: bool) -> Result<(), Error> {
        // boringtun cannot change a peer (it panics): remove it first. The session is made anew with the next packet;
        // the endpoint that was learned is in `peer`.
        if exists && self.backend == Backend::Userspace {
            self.delete_peer(key).await?;
        }
        let mut config =
            PeerConfigBuilder::new(&control_key(key)).replace_allowed_ips().set_persistent_keepalive_interval(peer.keepalive.unwrap_or(0));
        if let Some(endpoint) = peer.endpoint {
            config = config.set_endpoint(endpoint);
        }
        for prefix in &peer.allowed {
            config = config.add_allowed_ip(prefix.addr(), prefix.prefix_len());
        }
        self.update(DeviceUpdate::new().add_peer(config), format!("put peer {key} into {}", self.name)).await
    }

    /// Makes a handshake with a peer that we dial happen now: the first one, or one with a peer that is dead. The kernel does so by itself when a keepalive is set;
    /// boringtun waits for a packet, or for the keepalive's whole interval: a packet to nobody's port it shall have.
    pub fn poke(&self, peer: &Peer) {
        let target = peer.allowed.first().filter(|_| self.backend == Backend::Userspace && peer.endpoint.is_some());
        let Some(target) = target.map(IpNet::network) else { return };
        let any = if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        // Port 9 is `discard`. Should it fail, the keepalive does the same a little later.
        let _ = std::net::UdpSocket::bind(any).and_then(|socket| socket.send_to(&[], (target, 9)));
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

/// `wireguard-control` blocks.
async fn blocking<T: Send + 'static>(action: String, work: impl FnOnce() -> std::io::Result<T> + Send + 'static) -> Result<T, Error> {
    let result = tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| Err(std::io::Error::other(e)));
    result.map_err(|source| Error::Request { action, source })
}

/// A key as `wireguard-control` has it, which takes one only as text.
fn control_key(key: PublicKey) -> Key {
    Key::from_base64(&key.to_string()).expect("base64 of 32 bytes is a key")
}

fn public_key(key: &Key) -> PublicKey {
    let mut bytes = [0; 32];
    bytes.copy_from_slice(key.as_bytes());
    PublicKey(bytes)
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
