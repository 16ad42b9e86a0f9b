//! Keys and values of the maps, as used by the eBPF programs and by user space. IP and MAC addresses are bytes in
//! network order; numbers are in host order.
//!
//! A node of the pool is identified by its *outer address*, the IPv4 address that overlay packets have in their outer
//! header. If the pool's address family is IPv6, a *stand-in* from 240.0.0.0/4 replaces it in all maps; `OUTER6` maps the
//! stand-in to the IPv6 address. So every lookup is the same for both, and an IPv4 pool pays nothing for IPv6.

/// Identifies a remote Gateway in maps and counters: a hash of the Gateway's name, computed by the
/// agent's plan; never 0.
pub type GatewayId = u32;

/// Gateway ID of counters that concern no particular Gateway.
pub const NO_GATEWAY: GatewayId = 0;

/// Key of an LPM trie, in the kernel's layout: prefix length in bits, then the address.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PrefixKey<A> {
    /// Length of the prefix in bits.
    pub prefix_len: u32,
    /// Network address of the prefix; host bits are zero.
    pub addr: A,
}

/// Value of `REMOTE4`/`REMOTE6`: how to reach a prefix of another pool.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remote {
    /// Gateway that announces the prefix.
    pub gateway: GatewayId,
    /// Outer address of the gateway node of *this* pool that carries the prefix; zero where the prefix's route leads to the
    /// tunnel of this node.
    pub via: [u8; 4],
}

/// Value of `LOCAL4`/`LOCAL6`: the node of this pool that owns a prefix.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Local {
    /// Outer address of the node.
    pub node: [u8; 4],
}

/// Value of `NODES`, whose key is the outer address: a node of this pool.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node {
    /// Bit set: [`NODE_IS_GATEWAY`].
    pub flags: u32,
}

/// Flag in [`Node::flags`]: the node is a gateway node of the pool.
pub const NODE_IS_GATEWAY: u32 = 1;

/// Value of `CONFIG`, which has one entry: the configuration of this node. It is a map instead of load-time globals so
/// that a restarted agent can change it without reloading the programs.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// Outer address of this node.
    pub node: [u8; 4],
    /// Interface index of the uplink, the device that faces the pool's LAN.
    pub uplink_ifindex: u32,
    /// Interface index of `raven0`.
    pub overlay_ifindex: u32,
    /// Interface index of `raven-wg0`; 0 on members of a pool without encryption.
    pub tunnel_ifindex: u32,
    /// Size of the largest inner packet that fits into the tunnel in bytes, from the IP header on.
    pub tunnel_mtu: u32,
    /// Bit set: [`CONFIG_TUNNEL_REDIRECT`], [`CONFIG_RELAY`], [`CONFIG_TC_GUARD`], [`CONFIG_NO_WRAP`],
    /// [`CONFIG_TUNNEL_SOURCE`], [`CONFIG_OUTER6`], [`CONFIG_ENCRYPTED`].
    pub flags: u32,
    /// UDP port of the tunnel; 0 on members of a pool without encryption.
    pub tunnel_port: u32,
    /// Changes whenever another table has changed. Entries of the path caches (`PATHS*`, `BACK*`) with
    /// another generation are invalid.
    pub generation: u32,
}

/// Value of `PATHS4`/`PATHS6`: cached result of the LPM lookups for one pair of addresses, one entry per
/// CPU and hash slot.
///
/// A valid entry means that a node of this pool may send from `source`, and that the Gateway has
/// `destination`. The cache makes a packet's cost independent of the number of prefixes. Another pair with the
/// same hash overwrites the entry.
///
/// `BACK4`/`BACK6` cache the opposite direction: `source` belongs to another pool, and `outer` is the node of this pool
/// that has `destination`. They are separate maps because the checks of the two directions differ.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Path<A> {
    /// Value of [`Config::generation`] at the time of the lookups.
    pub generation: u32,
    /// Gateway that has the destination (`PATHS*`) or the source (`BACK*`).
    pub gateway: GatewayId,
    /// Outer address of the sending node (`PATHS*`) or of the receiving node (`BACK*`).
    pub outer: [u8; 4],
    /// Inner source address.
    pub source: A,
    /// Inner destination address.
    pub destination: A,
}

/// Number of entries of each path cache per CPU; a power of two.
pub const PATHS: usize = 4096;

/// Flag in [`Config::flags`]: this kernel handles a packet with tunnel metadata that is redirected into WireGuard.
pub const CONFIG_TUNNEL_REDIRECT: u32 = 1;
/// Flag in [`Config::flags`]: this node is a relay; it forwards packets between other pools.
pub const CONFIG_RELAY: u32 = 2;
/// Flag in [`Config::flags`]: use a tunnel key on `raven0` instead of wrapping in place, where nodes of the pool are
/// reached by several devices or over IPv6, and for comparison in benchmarks.
pub const CONFIG_NO_WRAP: u32 = 8;
/// Flag in [`Config::flags`]: this kernel's tunnel keys have a source, which is [`Config::node`]. Its value is the number
/// of bytes by which such a key is longer.
pub const CONFIG_TUNNEL_SOURCE: u32 = 16;
/// Flag in [`Config::flags`]: the pool's address family is IPv6, and outer addresses in maps are stand-ins.
pub const CONFIG_OUTER6: u32 = 32;
/// Flag in [`Config::flags`]: the guard also runs at TC ingress, because at least one device has no XDP program of Raven.
/// Devices that have one count each initiation twice, which halves their limit.
pub const CONFIG_TC_GUARD: u32 = 4;
/// Flag in [`Config::flags`]: the pool has encryption. Its nodes are WireGuard peers of its gateway nodes, and the overlay
/// carries only intercepted connections.
pub const CONFIG_ENCRYPTED: u32 = 64;

/// Key of `COUNTERS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CounterKey {
    /// Remote Gateway, or [`NO_GATEWAY`].
    pub gateway: GatewayId,
    /// Number of the [`crate::Verdict`].
    pub verdict: u32,
}

/// Value of `COUNTERS`, one per CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Number of packets on the wire; each segment of an aggregate counts as one packet.
    pub packets: u64,
    /// Number of bytes of the packets as the program received them.
    pub bytes: u64,
}

/// Message from XDP to TC about an unwrapped packet, stored in front of the packet as XDP metadata (a multiple of 4
/// bytes). GRO merges only packets with equal metadata.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unwrapped {
    /// [`UNWRAPPED_MAGIC`]; any other value means that another program wrote the metadata.
    pub magic: u32,
    /// Gateway that has the destination.
    pub gateway: GatewayId,
}

/// Value of [`Unwrapped::magic`]: "rvn1" in ASCII.
pub const UNWRAPPED_MAGIC: u32 = 0x7276_6e31;

const _: () = assert!(size_of::<PrefixKey<[u8; 4]>>() == 8 && size_of::<PrefixKey<[u8; 16]>>() == 20);
const _: () = assert!(size_of::<Remote>() == 8 && size_of::<Local>() == 4 && size_of::<Node>() == 4);
/// Value of `HANDSHAKES`: number of handshake initiations from one source address within one window of about a second.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handshakes {
    /// Number of the window: nanoseconds since boot, shifted right by 30.
    pub window: u64,
    /// Number of initiations in the window.
    pub count: u64,
}

/// Limit of handshake initiations from one source address per window.
///
/// A peer without a session sends one initiation in five seconds, so the limit leaves room for two thousand peers
/// behind one address (CGNAT). Only initiations with a valid MAC count, so an attacker who floods from a peer's address must
/// know this node's public key or have captured an initiation, and send as many as take WireGuard a twentieth of a core
/// (some 100 µs each), before that peer is affected. Floods from many addresses are handled by WireGuard's cookies
/// (whitepaper §5.3); a limit over all sources would lock out roaming peers.
pub const MAX_HANDSHAKES: u64 = 512;

/// Record in `EVENTS`: a sample of a dropped packet. Each CPU writes at most one in [`SAMPLE_PERIOD_NS`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DropSample {
    /// Time of the drop in nanoseconds since boot.
    pub time_ns: u64,
    /// Number of the [`crate::Verdict`].
    pub verdict: u32,
    /// Remote Gateway, or [`NO_GATEWAY`].
    pub gateway: GatewayId,
    /// Interface index of the device on which the program received the packet.
    pub ifindex: u32,
    /// Length of the packet in bytes as the program received it.
    pub len: u32,
    /// Ethernet type in host order; 0 if the packet was not IP.
    pub ethertype: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Padding; always zero.
    pub _pad: u8,
    /// Source port in network order; zero if the protocol has no ports or the port was not read.
    pub source_port: [u8; 2],
    /// Destination port in network order; zero under the same conditions.
    pub destination_port: [u8; 2],
    /// Source address; an IPv4 address occupies the first four bytes.
    pub source: [u8; 16],
    /// Destination address; an IPv4 address occupies the first four bytes.
    pub destination: [u8; 16],
}

impl DropSample {
    /// Parses a record of the ring buffer, in this machine's byte order. Returns `None` if the length differs.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; size_of::<Self>()] = bytes.try_into().ok()?;
        let word = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let address = |at: usize| core::array::from_fn(|n| bytes[at + n]);
        Some(Self {
            time_ns: u64::from_ne_bytes(core::array::from_fn(|n| bytes[n])),
            verdict: word(8),
            gateway: word(12),
            ifindex: word(16),
            len: word(20),
            ethertype: u16::from_ne_bytes([bytes[24], bytes[25]]),
            protocol: bytes[26],
            _pad: 0,
            source_port: [bytes[28], bytes[29]],
            destination_port: [bytes[30], bytes[31]],
            source: address(32),
            destination: address(48),
        })
    }
}

/// Key of `KUBELETS`/`KUBELETS6`: connections to this address and TCP port are intercepted by a proxy of this pool.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KubeletAddress<A> {
    /// Address of a node of another pool, in network order.
    pub address: A,
    /// TCP port in host order.
    pub port: u16,
    /// Padding; always zero.
    pub _pad: u16,
}

/// Value of `KUBELETS`/`KUBELETS6`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KubeletNode {
    /// Name of the node for diagnostics, truncated and padded with zeros. The proxy uses only the address.
    pub node: [u8; 64],
}

/// Minimum time between two [`DropSample`]s of one CPU in nanoseconds.
pub const SAMPLE_PERIOD_NS: u64 = 10_000_000;

const _: () =
    assert!(size_of::<Config>() == 32 && size_of::<Path<[u8; 4]>>() == 20 && size_of::<Path<[u8; 16]>>() == 44);
const _: () = assert!(
    size_of::<KubeletAddress<[u8; 4]>>() == 8
        && size_of::<KubeletAddress<[u8; 16]>>() == 20
        && size_of::<KubeletNode>() == 64
);
const _: () = assert!(size_of::<Handshakes>() == 16 && size_of::<DropSample>() == 64);
const _: () = assert!(size_of::<CounterKey>() == 8 && size_of::<Count>() == 16 && size_of::<Unwrapped>() == 8);

#[cfg(feature = "user")]
mod pod {
    use crate::{
        generator::{Generator, Sender},
        mac1::Mac1Key,
    };

    use super::{
        Config, Count, CounterKey, DropSample, Handshakes, KubeletAddress, KubeletNode, Local, Node, PrefixKey, Remote,
    };

    macro_rules! pod {
        ($($type:ty),*) => {$(
            // SAFETY: the type is repr(C) with only integers and byte arrays, and the size assertions above rule out
            // padding; so every bit pattern is a valid value and every byte is initialised.
            unsafe impl aya::Pod for $type {}
        )*};
    }

    pod!(
        Remote,
        Local,
        Node,
        Config,
        CounterKey,
        Count,
        Handshakes,
        DropSample,
        Generator,
        Sender,
        KubeletNode,
        Mac1Key
    );
    pod!(PrefixKey<[u8; 4]>, PrefixKey<[u8; 16]>, KubeletAddress<[u8; 4]>, KubeletAddress<[u8; 16]>);
}
