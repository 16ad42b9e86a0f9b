//! Values and keys of the maps, as both sides see them. Addresses and MACs are bytes in network order; numbers are
//! in the host's order.

/// Identifies a remote Gateway in maps and counters: a hash of its name (see the agent's plan), never 0.
pub type GatewayId = u32;

/// Counters that belong to no gateway are kept under this id.
pub const NO_GATEWAY: GatewayId = 0;

/// Key of an LPM trie: as the kernel wants it, prefix length in bits first.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PrefixKey<A> {
    /// Length of the prefix, bits.
    pub prefix_len: u32,
    /// The address, host bits zero.
    pub addr: A,
}

/// `REMOTE4`/`REMOTE6`: where a prefix of another pool is reached.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remote {
    /// The Gateway that has the prefix.
    pub gateway: GatewayId,
    /// Outer address of the gateway node of *this* pool that carries it; zero on that node itself.
    pub via: [u8; 4],
}

/// `LOCAL4`/`LOCAL6`: which node of this pool has a prefix.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Local {
    /// Outer address of the node.
    pub node: [u8; 4],
}

/// `NODES`: a node of this pool, by its outer address.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node {
    /// [`NODE_IS_GATEWAY`].
    pub flags: u32,
}

/// The node carries the pool's tunnel traffic.
pub const NODE_IS_GATEWAY: u32 = 1;

/// `CONFIG`, one entry: what the programs know of the node they run on. A map and not load-time globals, so that a
/// restarted agent can change it without touching a running program.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// Outer address of this node.
    pub node: [u8; 4],
    /// Device that faces the pool's LAN.
    pub uplink_ifindex: u32,
    /// `raven0`.
    pub overlay_ifindex: u32,
    /// `raven-wg0`; 0 on an ordinary node.
    pub tunnel_ifindex: u32,
    /// Largest inner packet that fits into the tunnel, bytes from the IP header on.
    pub tunnel_mtu: u32,
    /// [`CONFIG_TUNNEL_REDIRECT`] and its like.
    pub flags: u32,
    /// UDP port of the tunnel; 0 on an ordinary node.
    pub tunnel_port: u32,
    /// Changes whenever another table has changed; what `PATHS4` and `PATHS6` remember under another number is void.
    pub generation: u32,
}

/// `PATHS4`/`PATHS6`, one entry per CPU and hash of the addresses: that a node of this pool may send from `source`, and which
/// Gateway has `destination`. What three look-ups found, remembered, so that a packet's cost does not grow with the
/// number of prefixes. Overwritten by the next pair with the same hash.
///
/// `BACK4`/`BACK6` are the same for the other direction: `source` is another pool's, `outer` the node of this pool that has
/// `destination`. Tables of their own: what may come from one side may not come from the other.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Path<A> {
    /// [`Config::generation`] when it was found.
    pub generation: u32,
    /// The Gateway that has the destination.
    pub gateway: GatewayId,
    /// Outer address: the sender's, or on the way back the receiver's.
    pub outer: [u8; 4],
    /// Inner source address.
    pub source: A,
    /// Inner destination address.
    pub destination: A,
}

/// Entries of `PATHS4` and its like, per CPU; a power of two.
pub const PATHS: usize = 4096;

/// This kernel can take a packet with tunnel metadata that is redirected into WireGuard (EBPF.md).
pub const CONFIG_TUNNEL_REDIRECT: u32 = 1;
/// Packets of one remote pool for another may pass through this node.
pub const CONFIG_RELAY: u32 = 2;
/// Packets are not wrapped in place but by a tunnel key on `raven0`: for kernels that cannot, and to measure the difference.
pub const CONFIG_NO_WRAP: u32 = 8;
/// The guard runs at TC ingress of the uplink: there is no XDP program of ours in front of it.
pub const CONFIG_TC_GUARD: u32 = 4;

/// Key of `COUNTERS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CounterKey {
    /// The remote Gateway, or [`NO_GATEWAY`].
    pub gateway: GatewayId,
    /// [`crate::Verdict`] as a number.
    pub verdict: u32,
}

/// Value of `COUNTERS`, one per CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Packets as they were on the wire: the segments of an aggregate count one by one.
    pub packets: u64,
    /// Bytes, as the program saw the packet.
    pub bytes: u64,
}

/// What XDP tells TC about a packet that it unwrapped: lies in front of the packet as XDP metadata (a multiple of 4
/// bytes). GRO joins only packets whose metadata are the same.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unwrapped {
    /// [`UNWRAPPED_MAGIC`], else it is somebody else's metadata.
    pub magic: u32,
    /// The Gateway that has the destination.
    pub gateway: GatewayId,
}

/// "rvn1".
pub const UNWRAPPED_MAGIC: u32 = 0x7276_6e31;

const _: () = assert!(size_of::<PrefixKey<[u8; 4]>>() == 8 && size_of::<PrefixKey<[u8; 16]>>() == 20);
const _: () = assert!(size_of::<Remote>() == 8 && size_of::<Local>() == 4 && size_of::<Node>() == 4);
/// `HANDSHAKES`: handshake initiations from one source, within one window of about a second.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handshakes {
    /// Nanoseconds since boot, shifted right by 30.
    pub window: u64,
    /// Initiations in it.
    pub count: u64,
}

/// Handshake initiations that one source address may send within a window. A peer sends one in five seconds while it has no
/// session; this leaves room for two thousand peers behind one address (CGNAT), and somebody who floods by a peer's address has to send
/// as many as cost WireGuard a twentieth of a core (some 100 µs each) before they are in that peer's way. What comes from many addresses
/// at once is WireGuard's own business (cookies, whitepaper §5.3): a limit over all sources would lock roaming peers out.
pub const MAX_HANDSHAKES: u64 = 512;

/// `EVENTS`: a dropped packet, for a person to look at. A sample: at most one per CPU in [`SAMPLE_PERIOD_NS`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DropSample {
    /// Nanoseconds since boot.
    pub time_ns: u64,
    /// [`crate::Verdict`] as a number.
    pub verdict: u32,
    /// The remote Gateway, or [`NO_GATEWAY`].
    pub gateway: GatewayId,
    /// Device that the packet was seen on.
    pub ifindex: u32,
    /// Bytes, as the program saw the packet.
    pub len: u32,
    /// Ethernet type, host order; 0 if it was not IP.
    pub ethertype: u16,
    /// IP protocol.
    pub protocol: u8,
    /// Fills up.
    pub _pad: u8,
    /// Source port, network order; zero where there is none, or it was not read.
    pub source_port: [u8; 2],
    /// Destination port.
    pub destination_port: [u8; 2],
    /// Source; an IPv4 address stands in the first four bytes.
    pub source: [u8; 16],
    /// Destination.
    pub destination: [u8; 16],
}

impl DropSample {
    /// Reads a sample as the ring buffer has it: this machine's byte order. `None`: not a sample's length.
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

/// `KUBELETS`: key. Connections to this address and port end in the proxy of this gateway node.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KubeletAddress {
    /// A node of another pool, network order.
    pub address: [u8; 4],
    /// TCP port, host order.
    pub port: u16,
    /// Fills up.
    pub _pad: u16,
}

/// `KUBELETS`: value.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KubeletNode {
    /// The node's name, cut to fit, zeros behind it; for people, the proxy goes by the address.
    pub node: [u8; 64],
}

/// See [`DropSample`].
pub const SAMPLE_PERIOD_NS: u64 = 10_000_000;

const _: () = assert!(size_of::<Config>() == 32 && size_of::<Path<[u8; 4]>>() == 20 && size_of::<Path<[u8; 16]>>() == 44);
const _: () = assert!(size_of::<KubeletAddress>() == 8 && size_of::<KubeletNode>() == 64);
const _: () = assert!(size_of::<Handshakes>() == 16 && size_of::<DropSample>() == 64);
const _: () = assert!(size_of::<CounterKey>() == 8 && size_of::<Count>() == 16 && size_of::<Unwrapped>() == 8);

#[cfg(feature = "user")]
mod pod {
    use crate::generator::{Generator, Sender};

    use super::{Config, Count, CounterKey, DropSample, Handshakes, KubeletAddress, KubeletNode, Local, Node, PrefixKey, Remote};

    macro_rules! pod {
        ($($type:ty),*) => {$(
            // SAFETY: repr(C), only integers and byte arrays, and the size assertions above show that there is no
            // padding; so every bit pattern is a value and every byte is initialised.
            unsafe impl aya::Pod for $type {}
        )*};
    }

    pod!(Remote, Local, Node, Config, CounterKey, Count, Handshakes, DropSample, Generator, Sender, KubeletAddress, KubeletNode);
    pod!(PrefixKey<[u8; 4]>, PrefixKey<[u8; 16]>);
}
