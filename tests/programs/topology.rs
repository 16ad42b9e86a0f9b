//! The topology of all tests: one pool with three nodes, and the prefixes of other pools.

use raven_common::tables::{Config, GatewayId, NO_GATEWAY};

/// Address of the node on which the program runs.
pub(crate) const ME: [u8; 4] = [10, 0, 0, 11];
/// Address of a member of the pool.
pub(crate) const MEMBER: [u8; 4] = [10, 0, 0, 12];
/// Address of another gateway node of the pool.
pub(crate) const GATEWAY: [u8; 4] = [10, 0, 0, 10];
/// Address on the same LAN that belongs to no node of the pool.
pub(crate) const OUTSIDER: [u8; 4] = [10, 0, 0, 99];

/// Gateway of another pool.
pub(crate) const EDGE: GatewayId = 71;
/// Gateway of a third pool.
pub(crate) const FAR: GatewayId = 72;
/// Gateway of a pool for which this pool has no gateway node.
pub(crate) const LOST: GatewayId = 73;

/// A prefix in both families with one pod that sends and receives.
///
/// The prefixes are chosen for the programs of `raven-wg0`, whose packets have no Ethernet header. A test run takes the
/// first 14 bytes for an Ethernet header and sets the packet's type from bytes 12 and 13. In an IP packet of either
/// family, these are part of the source address. With sources in 8.0.0.0/16 they are 0x0800, with 2001:db8:86dd::/48
/// they are 0x86dd: so the type is correct, and the program sees the packet from its first byte on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Net(pub u8);

/// Prefix of [`ME`].
pub(crate) const MINE: Net = Net(1);
/// Prefix of [`MEMBER`].
pub(crate) const MEMBERS: Net = Net(2);
/// Prefix of [`GATEWAY`].
pub(crate) const GATEWAYS: Net = Net(3);
/// Prefix of the pool behind [`EDGE`].
pub(crate) const EDGES: Net = Net(101);
/// Prefix of the pool behind [`FAR`].
pub(crate) const FARS: Net = Net(102);
/// Prefix of the pool behind [`LOST`].
pub(crate) const LOSTS: Net = Net(103);
/// Prefix that is in no table.
pub(crate) const UNKNOWN: Net = Net(200);
/// Prefix that is only in the tables of kubelets.
pub(crate) const KUBELET: Net = Net(201);
/// TCP port of the kubelet, which is the destination port of all segments in the tests.
pub(crate) const KUBELET_PORT: u16 = 443;

impl Net {
    /// Returns the IPv4 prefix, a /24.
    pub(crate) fn prefix4(self) -> [u8; 4] {
        [8, 0, self.0, 0]
    }

    /// Returns the IPv6 prefix, a /64.
    pub(crate) fn prefix6(self) -> [u8; 16] {
        [0x20, 0x01, 0x0d, 0xb8, 0x86, 0xdd, 0, self.0, 0, 0, 0, 0, 0, 0, 0, 0]
    }

    /// Returns the pod's IPv4 address.
    pub(crate) fn pod4(self) -> [u8; 4] {
        [8, 0, self.0, 5]
    }

    /// Returns the pod's IPv6 address.
    pub(crate) fn pod6(self) -> [u8; 16] {
        let mut address = self.prefix6();
        address[15] = 5;
        address
    }
}

/// Prefixes of the pool's nodes.
pub(crate) const LOCAL: [(Net, [u8; 4]); 3] = [(MINE, ME), (MEMBERS, MEMBER), (GATEWAYS, GATEWAY)];

/// Prefixes of other pools, by Gateway.
pub(crate) const REMOTE: [(Net, GatewayId); 3] = [(EDGES, EDGE), (FARS, FAR), (LOSTS, LOST)];

/// Size of the largest packet that fits into the tunnel in bytes.
pub(crate) const TUNNEL_MTU: u32 = 1420;
/// UDP port of the tunnel.
pub(crate) const TUNNEL_PORT: u16 = 4500;
/// Interface index of the uplink; arbitrary, because test runs do not use it.
pub(crate) const UPLINK: u32 = 1001;
/// Interface index of `raven0`; arbitrary.
pub(crate) const OVERLAY: u32 = 1002;
/// Interface index of `raven-wg0`; arbitrary.
pub(crate) const TUNNEL: u32 = 1003;

/// Returns the configuration of [`ME`] as a member.
pub(crate) fn member() -> Config {
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

/// Returns the configuration of [`ME`] as a gateway node with all features of a new kernel and as a relay.
pub(crate) fn gateway() -> Config {
    use raven_common::tables::{CONFIG_RELAY, CONFIG_TUNNEL_REDIRECT};
    Config {
        tunnel_ifindex: TUNNEL,
        flags: CONFIG_TUNNEL_REDIRECT | CONFIG_RELAY,
        tunnel_port: TUNNEL_PORT.into(),
        ..member()
    }
}

/// Returns the configuration of [`ME`] in a pool with encryption.
pub(crate) fn encrypted() -> Config {
    let gateway = gateway();
    Config { flags: gateway.flags | raven_common::tables::CONFIG_ENCRYPTED, ..gateway }
}

/// Gateway ID of packets that are counted for no Gateway.
pub(crate) const NONE: GatewayId = NO_GATEWAY;
