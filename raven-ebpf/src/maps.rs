//! All maps: key, writer, reader, and the behaviour when a map is full. User space (the agent's `bpf/tables.rs`) is the
//! only writer unless a map's comment names another one. Maps are pinned under `/sys/fs/bpf/raven/<layout>/maps/` and
//! carry BTF, so `bpftool map dump` shows their fields by name.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, PerCpuHashMap, RingBuf, SockMap, lpm_trie::Key},
    macros::btf_map,
};
use raven_common::{
    header::{Ip, Ipv4, Ipv6},
    mac1::{Mac1Check, Mac1Key},
    tables::{
        CONFIG_OUTER6, Config, Count, CounterKey, DropSample, Handshakes, KubeletAddress, KubeletNode, Local, Node,
        PATHS, Path, Remote,
    },
};

/// Limit of prefixes per trie and family: ten thousand nodes with a dozen prefixes each. Tries
/// allocate memory per entry.
const MAX_PREFIXES: usize = 131_072;
/// Limit of nodes in one pool.
const MAX_POOL_NODES: usize = 16_384;
/// Limit of IPv6 addresses of the nodes in one pool.
const MAX_NODE_ADDRESSES: usize = 2 * MAX_POOL_NODES;
/// Limit of (Gateway, verdict) pairs: ten thousand Gateways with half a dozen verdicts each. Memory is allocated per
/// entry. When the map is full, new pairs are not counted; forwarding is not affected.
const MAX_COUNTERS: usize = 65_536;

/// Configuration of this node; one entry.
#[btf_map]
static CONFIG: Array<Config, 1> = Array::new();

/// IPv4 prefixes of other pools. Key: prefix in network order. Full: the agent reports the prefixes that do not fit.
#[btf_map]
static REMOTE4: LpmTrie<[u8; 4], Remote, MAX_PREFIXES> = LpmTrie::new();
/// IPv6 prefixes of other pools, as [`REMOTE4`].
#[btf_map]
static REMOTE6: LpmTrie<[u8; 16], Remote, MAX_PREFIXES> = LpmTrie::new();

/// IPv4 prefixes of this pool's nodes.
#[btf_map]
static LOCAL4: LpmTrie<[u8; 4], Local, MAX_PREFIXES> = LpmTrie::new();
/// IPv6 prefixes of this pool's nodes.
#[btf_map]
static LOCAL6: LpmTrie<[u8; 16], Local, MAX_PREFIXES> = LpmTrie::new();

/// Nodes of this pool by outer address (network order).
#[btf_map]
static NODES: HashMap<[u8; 4], Node, MAX_POOL_NODES> = HashMap::new();

/// IPv6 addresses of this pool's nodes, with the node's outer address.
#[btf_map]
static NODES6: HashMap<[u8; 16], [u8; 4], MAX_NODE_ADDRESSES, { BPF_F_NO_PREALLOC as usize }> = HashMap::new();
/// IPv6 address by stand-in; empty in an IPv4 pool.
#[btf_map]
static OUTER6: HashMap<[u8; 4], [u8; 16], MAX_POOL_NODES, { BPF_F_NO_PREALLOC as usize }> = HashMap::new();

/// Packets and bytes per (remote Gateway, verdict) and CPU. Written by the programs, read by the agent.
#[btf_map]
pub static COUNTERS: PerCpuHashMap<CounterKey, Count, MAX_COUNTERS, { BPF_F_NO_PREALLOC as usize }> =
    PerCpuHashMap::new();

/// LPM results for pairs of IPv4 addresses on the path into the tunnel. Written and read by `uplink_xdp`, per CPU.
#[btf_map]
static PATHS4: PerCpuArray<Path<[u8; 4]>, PATHS> = PerCpuArray::new();
/// LPM results for pairs of IPv6 addresses, as [`PATHS4`].
#[btf_map]
static PATHS6: PerCpuArray<Path<[u8; 16]>, PATHS> = PerCpuArray::new();

/// LPM results for pairs of IPv4 addresses on the path out of the tunnel. Written and read
/// by `tunnel_ingress`, per CPU.
#[btf_map]
static BACK4: PerCpuArray<Path<[u8; 4]>, PATHS> = PerCpuArray::new();
/// LPM results for pairs of IPv6 addresses, as [`BACK4`].
#[btf_map]
static BACK6: PerCpuArray<Path<[u8; 16]>, PATHS> = PerCpuArray::new();

/// Handshake initiations by source, written by the guard. Key: an IPv4 address in bytes 0 to 3; or the first 64 bits of an
/// IPv6 address in bytes 0 to 7 and 6 in byte 15, because a host can use every address of its /64. Full: the least recently
/// used entry is evicted.
#[btf_map]
pub static HANDSHAKES: LruHashMap<[u8; 16], Handshakes, 8_192> = LruHashMap::new();

/// The key for the MAC of handshake initiations to this node. Written by the agent; zero while the tunnel does not use the
/// configured port or key.
#[btf_map]
static MAC1_KEY: Array<Mac1Key, 1> = Array::new();
/// The initiation that the guard checks, per CPU. Written and read by the guard.
#[btf_map]
static MAC1_CHECK: PerCpuArray<Mac1Check, 1> = PerCpuArray::new();

/// Samples of dropped packets. Written by the programs, read by the agent. Full: the sample is lost; the
/// packet is still counted.
#[btf_map]
pub static EVENTS: RingBuf<DropSample, 262_144> = RingBuf::new();

/// Time of this CPU's last sample in nanoseconds since boot.
#[btf_map]
pub static SAMPLED: PerCpuArray<u64, 1> = PerCpuArray::new();

/// Addresses and ports of other pools' kubelets that a proxy of this pool intercepts: the proxy of this node or, on a
/// member, of the gateway node to which the overlay carries the connection. Written by the agent. Full: the agent
/// reports the nodes that do not fit; they are still reachable by name.
#[btf_map]
static KUBELETS: HashMap<KubeletAddress<[u8; 4]>, KubeletNode, 131_072, { BPF_F_NO_PREALLOC as usize }> =
    HashMap::new();
/// IPv6 addresses and ports of other pools' kubelets, as [`KUBELETS`].
#[btf_map]
static KUBELETS6: HashMap<KubeletAddress<[u8; 16]>, KubeletNode, 131_072, { BPF_F_NO_PREALLOC as usize }> =
    HashMap::new();

/// The proxy's listener. The kernel removes the entry when the agent's socket is closed.
#[btf_map]
pub static PROXY: SockMap<1> = SockMap::new();

/// Returns the node's configuration; all zero until the agent has written it.
#[inline(always)]
pub fn config() -> Config {
    // The only entry of an array always exists; the verifier requires the branch.
    CONFIG.get(0).copied().unwrap_or_default()
}

/// Returns the key for the MAC of handshake initiations, if it is set.
#[inline(always)]
pub fn mac1_key() -> Option<&'static Mac1Key> {
    MAC1_KEY.get(0).filter(|key| !key.is_unset())
}

/// Returns this CPU's memory for the check of an initiation.
#[inline(always)]
pub fn mac1_check() -> Option<*mut Mac1Check> {
    MAC1_CHECK.get_ptr_mut(0)
}

/// Returns the node of this pool with the outer address `outer`.
#[inline(always)]
pub fn node(outer: &[u8; 4]) -> Option<Node> {
    // SAFETY: the value is copied immediately. A concurrent delete can at worst yield the flags of another entry for
    // one packet, which is equivalent to the packet arriving slightly earlier.
    unsafe { NODES.get(outer) }.copied()
}

/// Returns the outer address of the node of this pool that has the IPv6 address `address`.
#[inline(always)]
pub fn node6(address: &[u8; 16]) -> Option<[u8; 4]> {
    // SAFETY: as in `node`.
    unsafe { NODES6.get(address) }.copied()
}

/// Returns the IPv6 address behind a stand-in. If the entry is deleted concurrently, the reference may yield another
/// node's address for one packet.
#[inline(always)]
pub fn outer6(stand_in: &[u8; 4]) -> Option<&'static [u8; 16]> {
    // SAFETY: entries are never freed while a program runs (RCU).
    unsafe { OUTER6.get(stand_in) }
}

/// Access to the tables of one address family.
pub trait Tables: Ip {
    /// Looks up the remote prefix that contains `addr`.
    fn remote(addr: Self::Addr) -> Option<Remote>;
    /// Looks up the node of this pool that owns `addr`.
    fn local(addr: Self::Addr) -> Option<Local>;
    /// Reports whether the source is one of the addresses of the node with the outer address `outer`.
    fn is_from(&self, outer: [u8; 4]) -> bool;
    /// Reports whether the destination is one of this node's addresses.
    fn is_to(&self, config: &Config) -> bool;
    /// Returns the source as the key of [`HANDSHAKES`].
    fn sender(&self) -> [u8; 16];
    /// Returns this CPU's cache entry for the packet's addresses, for the path into the tunnel.
    fn path(&self) -> Option<*mut Path<Self::Addr>>;
    /// Returns this CPU's cache entry for the packet's addresses, for the path out of the tunnel.
    fn back(&self) -> Option<*mut Path<Self::Addr>>;
    /// Reports whether a proxy of this pool intercepts connections to the packet's destination and TCP
    /// port `port` (host order).
    fn is_for_proxy(&self, port: u16) -> bool;
}

/// Reports whether [`KUBELETS6`] contains this address and port.
#[inline(always)]
pub fn is_kubelet6(address: [u8; 16], port: u16) -> bool {
    // SAFETY: as in `is_kubelet`.
    unsafe { KUBELETS6.get(&KubeletAddress { address, port, _pad: 0 }) }.is_some()
}

/// Reports whether [`KUBELETS`] contains this address and port.
#[inline(always)]
pub fn is_kubelet(address: [u8; 4], port: u16) -> bool {
    // SAFETY: only the presence of the entry is tested; its value is not read.
    unsafe { KUBELETS.get(&KubeletAddress { address, port, _pad: 0 }) }.is_some()
}

/// Maps a hash to an index of the path caches: multiplication by the golden ratio, of which the upper
/// bits are best mixed.
#[inline(always)]
fn slot(bits: u32) -> u32 {
    bits.wrapping_mul(0x9e37_79b1) >> (32 - PATHS.trailing_zeros())
}

#[inline(always)]
fn mix4(header: &Ipv4) -> u32 {
    u32::from_ne_bytes(header.source).rotate_left(15) ^ u32::from_ne_bytes(header.destination)
}

/// Hashes the words that differ between pods: the last one, and the two in which prefixes end.
#[inline(always)]
fn mix6(header: &Ipv6) -> u32 {
    let mix = |a: &[u8; 16]| word(a, 12) ^ word(a, 8).rotate_left(7) ^ word(a, 4).rotate_left(13);
    mix(&header.source).rotate_left(15) ^ mix(&header.destination)
}

#[inline(always)]
fn word(bytes: &[u8; 16], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

impl Tables for Ipv4 {
    #[inline(always)]
    fn remote(addr: [u8; 4]) -> Option<Remote> {
        REMOTE4.get(&Key::new(32, addr)).copied()
    }
    #[inline(always)]
    fn local(addr: [u8; 4]) -> Option<Local> {
        LOCAL4.get(&Key::new(32, addr)).copied()
    }
    #[inline(always)]
    fn is_from(&self, outer: [u8; 4]) -> bool {
        self.source == outer
    }
    #[inline(always)]
    fn is_to(&self, config: &Config) -> bool {
        // A stand-in is no host's address.
        config.flags & CONFIG_OUTER6 == 0 && self.destination == config.node
    }
    #[inline(always)]
    fn sender(&self) -> [u8; 16] {
        let mut sender = [0; 16];
        sender[..4].copy_from_slice(&self.source);
        sender
    }
    #[inline(always)]
    fn path(&self) -> Option<*mut Path<[u8; 4]>> {
        PATHS4.get_ptr_mut(slot(mix4(self)))
    }
    #[inline(always)]
    fn back(&self) -> Option<*mut Path<[u8; 4]>> {
        BACK4.get_ptr_mut(slot(mix4(self)))
    }
    #[inline(always)]
    fn is_for_proxy(&self, port: u16) -> bool {
        is_kubelet(self.destination, port)
    }
}

impl Tables for Ipv6 {
    #[inline(always)]
    fn remote(addr: [u8; 16]) -> Option<Remote> {
        REMOTE6.get(&Key::new(128, addr)).copied()
    }
    #[inline(always)]
    fn local(addr: [u8; 16]) -> Option<Local> {
        LOCAL6.get(&Key::new(128, addr)).copied()
    }
    #[inline(always)]
    fn is_from(&self, outer: [u8; 4]) -> bool {
        node6(&self.source) == Some(outer)
    }
    #[inline(always)]
    fn is_to(&self, config: &Config) -> bool {
        node6(&self.destination) == Some(config.node)
    }
    #[inline(always)]
    fn sender(&self) -> [u8; 16] {
        let mut sender = [0; 16];
        sender[..8].copy_from_slice(&self.source[..8]);
        sender[15] = 6;
        sender
    }
    #[inline(always)]
    fn path(&self) -> Option<*mut Path<[u8; 16]>> {
        PATHS6.get_ptr_mut(slot(mix6(self)))
    }
    #[inline(always)]
    fn back(&self) -> Option<*mut Path<[u8; 16]>> {
        BACK6.get_ptr_mut(slot(mix6(self)))
    }
    #[inline(always)]
    fn is_for_proxy(&self, port: u16) -> bool {
        is_kubelet6(self.destination, port)
    }
}
