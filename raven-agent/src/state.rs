//! Kernel state as plain data: the plan's desired state and the drivers' observed state.
//!
//! The lowest layer of the agent: [`plan`](crate::plan) produces these types, [`diff`](crate::diff) compares them, the
//! drivers read and write them. Nothing here does I/O, and nothing here depends on another module but the checked keys
//! of the topology.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    iter::Sum,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    ops::AddAssign,
};

use ipnet::IpNet;
use raven_common::tables::{self, Local, Node, Remote};

use crate::topology::{PresharedKey, PublicKey};

/// The keyed part of the kernel's state, which [`diff`](crate::diff::diff) compares entry by entry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Routes of Raven's table, by destination.
    pub routes: BTreeMap<IpNet, Route>,
    /// Unreachable routes of Raven's table, one behind each of [`State::routes`]: while the device of a route is missing,
    /// they refuse its packets, which would otherwise leave by another route, unencrypted.
    pub barriers: BTreeSet<IpNet>,
    /// WireGuard peers.
    pub peers: BTreeMap<PublicKey, Peer>,
    /// Maps `REMOTE4` and `REMOTE6`.
    pub remote: BTreeMap<IpNet, Remote>,
    /// Maps `LOCAL4` and `LOCAL6`.
    pub local: BTreeMap<IpNet, Local>,
    /// Map `NODES`.
    pub nodes: BTreeMap<Ipv4Addr, Node>,
    /// Map `NODES6`.
    pub nodes6: BTreeMap<Ipv6Addr, Ipv4Addr>,
    /// Map `OUTER6`.
    pub outer6: BTreeMap<Ipv4Addr, Ipv6Addr>,
}

/// One of Raven's devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// `raven0`.
    Overlay,
    /// `raven-wg0`.
    Tunnel,
}

/// A route of Raven's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// Output device.
    pub device: Device,
    /// Source address of packets that host processes send.
    pub source: Option<IpAddr>,
    /// MTU in bytes.
    pub mtu: u32,
}

/// A WireGuard peer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// Endpoint: configured in a plan, learned or configured in the kernel.
    pub endpoint: Option<SocketAddr>,
    /// Allowed IPs.
    pub allowed: BTreeSet<IpNet>,
    /// Persistent keepalive in seconds.
    pub keepalive: Option<u16>,
    /// Preshared key.
    pub preshared: Preshared,
    /// The last handshake is at most 180 s old. Observed only; a plan never sets it.
    pub alive: bool,
}

/// The preshared key of a peer (WireGuard whitepaper §5.2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preshared {
    /// The peer has none.
    #[default]
    None,
    /// The key of all tunnels of the cluster.
    Key(PresharedKey),
    /// In a plan only: the key file could not be read yet. The peer keeps what WireGuard has.
    Keep,
}

impl From<Option<PresharedKey>> for Preshared {
    fn from(key: Option<PresharedKey>) -> Self {
        key.map_or(Self::None, Self::Key)
    }
}

/// What a node is to its pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// In no pool: nothing is set up.
    None,
    /// Sends packets for other pools to a gateway node.
    Member,
    /// Carries the traffic of its pool.
    Gateway,
}

impl Role {
    /// Name in logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Member => "member",
            Self::Gateway => "gateway",
        }
    }
}

/// The names behind a peer's key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerName {
    /// Name of the node.
    pub node: String,
    /// Name of its Gateway.
    pub gateway: String,
}

/// Settings of the overlay device `raven0`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overlay {
    /// MTU in bytes.
    pub mtu: u32,
    /// One address per prefix of this node: the source of masqueraded packets and of packets from host processes.
    pub addresses: BTreeSet<IpNet>,
}

/// Settings of the tunnel device `raven-wg0`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunnelDevice {
    /// MTU in bytes.
    pub mtu: u32,
    /// UDP port that WireGuard listens on.
    pub port: u16,
}

/// Interception: connections by address that are redirected to a proxy of this pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interception {
    /// Where the connections go.
    pub to: InterceptTo,
    /// Source addresses of connections that host processes open, at most one per family. The other fields have addresses
    /// of these families only.
    pub sources: Vec<IpAddr>,
    /// Kubelets of edge nodes.
    pub kubelets: Intercepted,
    /// Proxies of other exposed pools. The Service sends requests by name to any proxy, also to one that this node cannot
    /// reach; the proxy of its own pool can answer all of them.
    pub proxies: Intercepted,
}

impl Interception {
    /// Leaves out the addresses that this node's own tunnel carries, if the connections would take the overlay to another
    /// gateway node.
    pub fn leave_to_tunnel(&mut self, routes: &BTreeMap<IpNet, Route>) {
        if matches!(self.to, InterceptTo::Gateway(_)) {
            for intercepted in [&mut self.kubelets, &mut self.proxies] {
                intercepted.nodes.retain(|address, _| !routes.contains_key(&IpNet::from(*address)));
            }
        }
    }
}

/// Nodes and TCP ports to which connections are intercepted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Intercepted {
    /// Node names by address. Nodes that share an address are joined by " or ".
    pub nodes: BTreeMap<IpAddr, String>,
    /// TCP ports.
    pub ports: BTreeSet<u16>,
}

/// The destination of intercepted connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InterceptTo {
    /// The proxy on this node.
    Here,
    /// The proxy on the gateway node of the pool with this outer address, over the overlay.
    Gateway(Ipv4Addr),
}

/// The planned part of [`tables::Config`], the programs' view of this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Outer address of this node in maps: `address`, or its stand-in.
    pub node: Ipv4Addr,
    /// The address of this node inside its pool, the source of its overlay packets.
    pub address: IpAddr,
    /// Largest inner packet in bytes.
    pub tunnel_mtu: u32,
    /// This node relays between other pools.
    pub relay: bool,
    /// The pool has encryption: its nodes are peers of its gateway nodes.
    pub encrypted: bool,
    /// UDP port of the tunnel; 0 on a node without one.
    pub tunnel_port: u16,
}

/// Interface indexes, as the drivers found them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Indexes {
    /// The device that faces the pool's LAN.
    pub uplink: u32,
    /// `raven0`.
    pub overlay: u32,
    /// `raven-wg0`, on a gateway node, and on all nodes of a pool with encryption.
    pub tunnel: Option<u32>,
}

impl Indexes {
    /// For requests about routes that have no device. Linux has no interface with index 0.
    pub const NONE: Self = Self { uplink: 0, overlay: 0, tunnel: None };
}

impl Config {
    /// The entry of map `CONFIG`. `generation` is the table's present one, which the bpf driver advances when another
    /// table changes.
    pub fn to_table(self, indexes: Indexes, abilities: Abilities, generation: u32) -> tables::Config {
        let flag = |set: bool, flag: u32| if set { flag } else { 0 };
        let flags = flag(abilities.redirects_into_tunnel, tables::CONFIG_TUNNEL_REDIRECT)
            | flag(self.relay, tables::CONFIG_RELAY)
            | flag(self.encrypted, tables::CONFIG_ENCRYPTED)
            | flag(!abilities.guards_in_xdp, tables::CONFIG_TC_GUARD)
            | flag(!abilities.one_uplink || self.address.is_ipv6(), tables::CONFIG_NO_WRAP)
            | flag(self.address.is_ipv6(), tables::CONFIG_OUTER6)
            | flag(abilities.sets_source, tables::CONFIG_TUNNEL_SOURCE);
        tables::Config {
            node: self.node.octets(),
            uplink_ifindex: indexes.uplink,
            overlay_ifindex: indexes.overlay,
            tunnel_ifindex: indexes.tunnel.unwrap_or(0),
            tunnel_mtu: self.tunnel_mtu,
            flags,
            tunnel_port: self.tunnel_port.into(),
            generation,
        }
    }
}

/// What this kernel and this node's network allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Abilities {
    /// The kernel accepts a redirect from `raven0` into the tunnel.
    pub redirects_into_tunnel: bool,
    /// Raven's XDP program is on every device by which packets for the tunnel's port and the overlay's arrive.
    pub guards_in_xdp: bool,
    /// `raven0` can be given the source of the outer header. Otherwise the kernel chooses it by its routes.
    pub sets_source: bool,
    /// All other nodes of the pool are reached by the uplink. Otherwise the kernel chooses the device by its routes.
    pub one_uplink: bool,
}

/// What a driver did: the number of kernel objects that it created, replaced or deleted. Zero when all
/// were right already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Change(pub u64);

impl Change {
    /// Nothing had to be changed.
    pub const NONE: Self = Self(0);
    /// One object changed.
    pub const ONE: Self = Self(1);

    /// True if at least one object changed.
    pub fn any(self) -> bool {
        self.0 > 0
    }

    /// Returns the change by a removal. A missing file is no error.
    pub fn unless_missing(removed: io::Result<()>) -> io::Result<Self> {
        match removed {
            Ok(()) => Ok(Self::ONE),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Self::NONE),
            Err(e) => Err(e),
        }
    }
}

impl From<bool> for Change {
    fn from(changed: bool) -> Self {
        if changed { Self::ONE } else { Self::NONE }
    }
}

impl AddAssign for Change {
    fn add_assign(&mut self, other: Self) {
        self.0 += other.0;
    }
}

impl Sum for Change {
    fn sum<I: Iterator<Item = Self>>(changes: I) -> Self {
        changes.fold(Self::NONE, |mut total, change| {
            total += change;
            total
        })
    }
}
