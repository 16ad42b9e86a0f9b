//! Who lives where, in all tests: one pool with three nodes, and the prefixes of other pools.

use raven_common::tables::{Config, GatewayId, NO_GATEWAY};

/// The node on which the program runs.
pub const ME: [u8; 4] = [10, 0, 0, 11];
/// Another node of the pool, an ordinary one.
pub const MEMBER: [u8; 4] = [10, 0, 0, 12];
/// A gateway node of the pool.
pub const GATEWAY: [u8; 4] = [10, 0, 0, 10];
/// On the same LAN, but no node of the pool.
pub const STRANGER: [u8; 4] = [10, 0, 0, 99];

/// The Gateways of two other pools.
pub const EDGE: GatewayId = 71;
/// See [`EDGE`].
pub const FAR: GatewayId = 72;
/// A pool that this pool has no gateway node for.
pub const LOST: GatewayId = 73;

/// A prefix in both families, and in it the one pod that sends and receives.
///
/// Why these prefixes: the programs of `raven-wg0` see packets without an Ethernet header, but a test run takes the
/// first 14 bytes for one and gives the program the type that it finds at bytes 12 and 13. In an IP packet the source
/// address lies there, in both families. With sources in 8.0.0.0/16 these bytes are 0x0800, with 2001:db8:86dd::/48
/// they are 0x86dd: the packet says itself what it is, and the program sees it from its first byte on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Net(pub u8);

/// Pods of [`ME`].
pub const MINE: Net = Net(1);
/// Pods of [`MEMBER`].
pub const MEMBERS: Net = Net(2);
/// Pods of [`GATEWAY`].
pub const GATEWAYS: Net = Net(3);
/// Pods of the pool behind [`EDGE`].
pub const EDGES: Net = Net(101);
/// Pods of the pool behind [`FAR`].
pub const FARS: Net = Net(102);
/// Pods of the pool behind [`LOST`].
pub const LOSTS: Net = Net(103);
/// In no table.
pub const NOBODYS: Net = Net(200);
/// In no table but that of the kubelets, whose TCP port is that of all our segments. IPv4 only.
pub const KUBELET: Net = Net(201);
/// See [`KUBELET`].
pub const KUBELET_PORT: u16 = 443;

impl Net {
    /// The IPv4 prefix, a /24.
    pub fn prefix4(self) -> [u8; 4] {
        [8, 0, self.0, 0]
    }

    /// The IPv6 prefix, a /64.
    pub fn prefix6(self) -> [u8; 16] {
        [0x20, 0x01, 0x0d, 0xb8, 0x86, 0xdd, 0, self.0, 0, 0, 0, 0, 0, 0, 0, 0]
    }

    /// The pod.
    pub fn pod4(self) -> [u8; 4] {
        [8, 0, self.0, 5]
    }

    /// The pod.
    pub fn pod6(self) -> [u8; 16] {
        let mut address = self.prefix6();
        address[15] = 5;
        address
    }
}

/// Which node of the pool has which prefix.
pub const LOCAL: [(Net, [u8; 4]); 3] = [(MINE, ME), (MEMBERS, MEMBER), (GATEWAYS, GATEWAY)];

/// Which Gateway has which prefix.
pub const REMOTE: [(Net, GatewayId); 3] = [(EDGES, EDGE), (FARS, FAR), (LOSTS, LOST)];

/// Largest packet that fits into the tunnel.
pub const TUNNEL_MTU: u32 = 1420;
/// UDP port of the tunnel.
pub const TUNNEL_PORT: u16 = 4500;
/// Device numbers that no test run looks at.
pub const UPLINK: u32 = 1001;
/// See [`UPLINK`].
pub const OVERLAY: u32 = 1002;
/// See [`UPLINK`].
pub const TUNNEL: u32 = 1003;

/// [`ME`] as an ordinary node.
pub fn ordinary() -> Config {
    Config {
        node: ME,
        uplink_ifindex: UPLINK,
        overlay_ifindex: OVERLAY,
        tunnel_ifindex: 0,
        tunnel_mtu: TUNNEL_MTU,
        flags: 0,
        tunnel_port: 0,
        generation: 1,
    }
}

/// [`ME`] as a gateway node with all that a new kernel can do, relay included.
pub fn gateway() -> Config {
    use raven_common::tables::{CONFIG_RELAY, CONFIG_TUNNEL_REDIRECT};
    Config { tunnel_ifindex: TUNNEL, flags: CONFIG_TUNNEL_REDIRECT | CONFIG_RELAY, tunnel_port: TUNNEL_PORT.into(), ..ordinary() }
}

/// Counted for no Gateway.
pub const NONE: GatewayId = NO_GATEWAY;
