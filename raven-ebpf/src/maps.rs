//! Every map: who writes, who reads, its key and what happens when it is full. User space (the agent's `bpf/tables.rs`)
//! is the only writer of all but `COUNTERS`. They are pinned under `/sys/fs/bpf/raven/<layout>/maps/` and carry BTF, so
//! `bpftool map dump` shows their fields by name.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, PerCpuHashMap, RingBuf, SockMap, lpm_trie::Key},
    macros::btf_map,
};
use raven_common::{
    header::{Ip, Ipv4, Ipv6},
    tables::{Config, Count, CounterKey, DropSample, Handshakes, KubeletAddress, KubeletNode, Local, Node, PATHS, Path, Remote},
};

/// Prefixes per trie and family: ten thousand nodes with a dozen prefixes each. Tries take memory by use, not by size.
const MAX_PREFIXES: usize = 131_072;
/// Nodes of one pool.
const MAX_POOL_NODES: usize = 16_384;
/// Gateways × verdicts that were ever seen: ten thousand Gateways with half a dozen each. Takes memory by use. When it is full, new pairs
/// are not counted; nothing else happens.
const MAX_COUNTERS: usize = 65_536;

/// One entry: this node.
#[btf_map]
static CONFIG: Array<Config, 1> = Array::new();

/// Prefixes of other pools, IPv4. Key: prefix in network order. Full: the agent reports the prefix that has no place.
#[btf_map]
static REMOTE4: LpmTrie<[u8; 4], Remote, MAX_PREFIXES> = LpmTrie::new();
/// The same for IPv6.
#[btf_map]
static REMOTE6: LpmTrie<[u8; 16], Remote, MAX_PREFIXES> = LpmTrie::new();

/// Prefixes of this pool's nodes, IPv4.
#[btf_map]
static LOCAL4: LpmTrie<[u8; 4], Local, MAX_PREFIXES> = LpmTrie::new();
/// The same for IPv6.
#[btf_map]
static LOCAL6: LpmTrie<[u8; 16], Local, MAX_PREFIXES> = LpmTrie::new();

/// Nodes of this pool by outer address (network order).
#[btf_map]
static NODES: HashMap<[u8; 4], Node, MAX_POOL_NODES> = HashMap::new();

/// Packets and bytes per (remote gateway, verdict) and CPU. Written by the programs, read by everybody.
#[btf_map]
pub static COUNTERS: PerCpuHashMap<CounterKey, Count, MAX_COUNTERS, { BPF_F_NO_PREALLOC as usize }> = PerCpuHashMap::new();

/// What the tries said of a pair of addresses, IPv4. Written and read by `uplink_xdp`, each CPU for itself.
#[btf_map]
static PATHS4: PerCpuArray<Path<[u8; 4]>, PATHS> = PerCpuArray::new();
/// The same for IPv6.
#[btf_map]
static PATHS6: PerCpuArray<Path<[u8; 16]>, PATHS> = PerCpuArray::new();

/// The same for the way back, by `tunnel_ingress`.
#[btf_map]
static BACK4: PerCpuArray<Path<[u8; 4]>, PATHS> = PerCpuArray::new();
/// The same for IPv6.
#[btf_map]
static BACK6: PerCpuArray<Path<[u8; 16]>, PATHS> = PerCpuArray::new();

/// Handshake initiations by source address (IPv4 in the first four bytes). Written by the guard. Full: the one that was
/// silent longest is forgotten.
#[btf_map]
pub static HANDSHAKES: LruHashMap<[u8; 16], Handshakes, 8_192> = LruHashMap::new();

/// Samples of dropped packets. Written by the programs, read by the agent. Full: the sample is lost, the packet is counted
/// all the same.
#[btf_map]
pub static EVENTS: RingBuf<DropSample, 262_144> = RingBuf::new();

/// When this CPU last wrote a sample, nanoseconds since boot.
#[btf_map]
pub static SAMPLED: PerCpuArray<u64, 1> = PerCpuArray::new();

/// Addresses and ports of other pools' nodes that a proxy of this pool answers for: this node's, or on an ordinary node that of the
/// gateway node to which the overlay brings the connection. Written by the agent. Full: the agent reports the node that has no place; it
/// is still reached by name.
#[btf_map]
pub static KUBELETS: HashMap<KubeletAddress, KubeletNode, 131_072, { BPF_F_NO_PREALLOC as usize }> = HashMap::new();

/// The proxy's listener, while an agent runs: the kernel takes it out when it is closed.
#[btf_map]
pub static PROXY: SockMap<1> = SockMap::new();

/// The node's configuration; all zero until the agent has written it.
#[inline(always)]
pub fn config() -> Config {
    // An array's only entry always exists; the branch is for the verifier.
    CONFIG.get(0).copied().unwrap_or_default()
}

/// The node of this pool with this outer address.
#[inline(always)]
pub fn node(outer: &[u8; 4]) -> Option<Node> {
    // SAFETY: the value is copied at once; a concurrent delete can at worst hand us the bytes of another entry's
    // flags, and then for one packet only, which is the same race as the packet coming a moment earlier.
    unsafe { NODES.get(outer) }.copied()
}

/// The prefix tables of one family.
pub trait Tables: Ip {
    /// The other pool that has `addr`.
    fn remote(addr: Self::Addr) -> Option<Remote>;
    /// The node of this pool that has `addr`.
    fn local(addr: Self::Addr) -> Option<Local>;
    /// Where this CPU remembers the packet's addresses, on its way into the tunnel.
    fn path(&self) -> Option<*mut Path<Self::Addr>>;
    /// The same on its way out of it.
    fn back(&self) -> Option<*mut Path<Self::Addr>>;
    /// A proxy of this pool takes connections to the packet's destination and this TCP port (host order).
    fn is_for_proxy(&self, port: u16) -> bool;
}

/// True if [`KUBELETS`] has this address and port.
#[inline(always)]
pub fn is_kubelet(address: [u8; 4], port: u16) -> bool {
    // SAFETY: only whether there is an entry counts; nothing of it is read.
    unsafe { KUBELETS.get(&KubeletAddress { address, port, _pad: 0 }) }.is_some()
}

/// Spreads addresses over the paths: a multiplication by the golden ratio, whose upper bits are the best.
#[inline(always)]
fn slot(bits: u32) -> u32 {
    bits.wrapping_mul(0x9e37_79b1) >> (32 - PATHS.trailing_zeros())
}

#[inline(always)]
fn mix4(header: &Ipv4) -> u32 {
    u32::from_ne_bytes(header.source).rotate_left(15) ^ u32::from_ne_bytes(header.destination)
}

/// What tells pods apart: the last word, and the two that a prefix ends in.
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
    fn path(&self) -> Option<*mut Path<[u8; 16]>> {
        PATHS6.get_ptr_mut(slot(mix6(self)))
    }
    #[inline(always)]
    fn back(&self) -> Option<*mut Path<[u8; 16]>> {
        BACK6.get_ptr_mut(slot(mix6(self)))
    }
    #[inline(always)]
    fn is_for_proxy(&self, _: u16) -> bool {
        false
    }
}
