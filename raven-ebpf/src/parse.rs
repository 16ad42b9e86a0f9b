//! A packet in TC, parsed once into small values. Loads go through the helper, so data outside the linear part is no
//! special case; nothing here holds a pointer across a helper that moves the packet.

use aya_ebpf::{EbpfContext, programs::TcContext};
use raven_common::{
    Verdict,
    header::{ETH_P_IP, ETH_P_IPV6, Ip},
};

use crate::count::Seen;

/// The context of a TC program.
pub struct Skb {
    pub ctx: TcContext,
}

/// The family of a packet.
#[derive(Clone, Copy)]
pub enum Family {
    V4,
    V6,
}

impl Skb {
    #[inline(always)]
    pub fn new(ctx: TcContext) -> Self {
        Self { ctx }
    }

    /// Length of the packet from where the program sees it, bytes.
    #[inline(always)]
    pub fn len(&self) -> u32 {
        self.ctx.len()
    }

    /// How many packets an aggregate (GRO, GSO) stands for; 1 for a plain packet.
    #[inline(always)]
    pub fn segments(&self) -> u32 {
        // SAFETY: the kernel hands the program a valid context; the verifier rewrites the load.
        let segments = unsafe { (*self.ctx.skb.skb).gso_segs };
        if segments == 0 { 1 } else { segments }
    }

    /// Payload bytes per segment of an aggregate; 0 for a plain packet. (Since Linux 5.7.)
    #[inline(always)]
    fn gso_size(&self) -> u32 {
        // SAFETY: as in `segments`.
        unsafe { (*self.ctx.skb.skb).gso_size }
    }

    /// The device that the program is attached to.
    #[inline(always)]
    pub fn ifindex(&self) -> u32 {
        // SAFETY: as in `segments`.
        unsafe { (*self.ctx.skb.skb).ifindex }
    }

    /// True for an aggregate.
    #[inline(always)]
    pub fn is_aggregate(&self) -> bool {
        self.gso_size() != 0
    }

    /// The flow's hash, computed if it has none.
    #[inline(always)]
    pub fn flow_hash(&self) -> u32 {
        // SAFETY: a helper call on the program's own context.
        unsafe { aya_ebpf::helpers::bpf_get_hash_recalc(self.ctx.skb.skb) }
    }

    /// Family by the Ethernet type that the kernel noted.
    #[inline(always)]
    pub fn family(&self) -> Result<Family, Seen> {
        // SAFETY: as in `segments`.
        match u16::from_be(unsafe { (*self.ctx.skb.skb).protocol } as u16) {
            ETH_P_IP => Ok(Family::V4),
            ETH_P_IPV6 => Ok(Family::V6),
            _ => Err(Verdict::DropNotIp.into()),
        }
    }

    /// The IP header at `l3`, sound by itself and not longer than the packet.
    #[inline(always)]
    pub fn ip<I: Ip>(&self, l3: usize) -> Result<I, Seen> {
        let header: I = self.ctx.load(l3).map_err(|_| Verdict::DropMalformed)?;
        // An aggregate's length field may be what its first segment had; the kernel's length is the truth there.
        let plausible = self.gso_size() != 0 || header.total_len() <= self.len().wrapping_sub(l3 as u32);
        if header.is_sound() && plausible { Ok(header) } else { Err(Verdict::DropMalformed.into()) }
    }

    /// Destination port (host order) of the packet whose IP header is at `l3`, if it is TCP and unfragmented.
    #[inline(always)]
    pub fn tcp_port<I: Ip>(&self, l3: usize, header: &I) -> Option<u16> {
        let port: [u8; 2] = self.ctx.load(l3 + header.tcp_offset()? + 2).ok()?;
        Some(u16::from_be_bytes(port))
    }

    /// True if the packet, or each segment of an aggregate, is at most `mtu` bytes from its IP header on.
    #[inline(always)]
    pub fn fits<I: Ip>(&self, l3: usize, header: &I, mtu: u32) -> bool {
        let payload = self.gso_size();
        if payload == 0 {
            return self.len().wrapping_sub(l3 as u32) <= mtu;
        }
        payload + self.headers_len(l3, header) <= mtu
    }

    /// Length of IP and transport header of an aggregate, bytes. UDP aggregates (8 bytes) are the other kind there is.
    #[inline(always)]
    fn headers_len<I: Ip>(&self, l3: usize, header: &I) -> u32 {
        match header.tcp_offset() {
            Some(tcp) => {
                let doff = self.ctx.load::<u8>(l3 + tcp + 12).unwrap_or(0xf0);
                tcp as u32 + (doff >> 4) as u32 * 4
            }
            None => I::LEN as u32 + 8,
        }
    }

    /// The raw context, for helpers that aya has no method for.
    #[inline(always)]
    pub fn raw(&self) -> *mut aya_ebpf::bindings::__sk_buff {
        self.ctx.as_ptr().cast()
    }
}
