//! A packet in TC, parsed into small values. Loads use the helper, which also reads data outside the linear part. No
//! pointer is held across a helper that moves the packet.

use aya_ebpf::{EbpfContext, helpers::bpf_skb_load_bytes, programs::TcContext};
use raven_common::{
    Verdict,
    header::{ETH_P_IP, ETH_P_IPV6, Ip},
};

use crate::count::Decision;

/// Context of a TC program.
pub struct Skb {
    pub ctx: TcContext,
}

/// Address family of a packet.
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

    /// Returns the length of the packet in bytes, from the layer at which the program receives it.
    #[inline(always)]
    pub fn len(&self) -> u32 {
        self.ctx.len()
    }

    /// Returns the number of packets in an aggregate (GRO, GSO); 1 for a plain packet.
    #[inline(always)]
    pub fn segments(&self) -> u32 {
        // SAFETY: the kernel passes a valid context to the program; the verifier rewrites the load.
        let segments = unsafe { (*self.ctx.skb.skb).gso_segs };
        if segments == 0 { 1 } else { segments }
    }

    /// Returns the payload bytes per segment of an aggregate; 0 for a plain packet. Since Linux 5.7.
    #[inline(always)]
    pub fn gso_size(&self) -> u32 {
        // SAFETY: as in `segments`.
        unsafe { (*self.ctx.skb.skb).gso_size }
    }

    /// Copies bytes at `offset` to `to`, which may be on the stack or in a map. Returns `None` if the packet is too short.
    /// `T` is integers or arrays of integers, for which any bytes are a valid value.
    #[inline(always)]
    pub fn copy<T: ?Sized>(&self, offset: usize, to: &mut T) -> Option<()> {
        let (to, len) = (core::ptr::from_mut(to).cast(), size_of_val(to) as u32);
        // SAFETY: `to` has `len` bytes, and every value is valid.
        let result = unsafe { bpf_skb_load_bytes(self.raw().cast(), offset as u32, to, len) };
        (result == 0).then_some(())
    }

    /// Returns the interface index of the device to which the program is attached.
    #[inline(always)]
    pub fn ifindex(&self) -> u32 {
        // SAFETY: as in `segments`.
        unsafe { (*self.ctx.skb.skb).ifindex }
    }

    /// Reports whether the packet is an aggregate.
    #[inline(always)]
    pub fn is_aggregate(&self) -> bool {
        self.gso_size() != 0
    }

    /// Returns the flow's hash; computes it if the packet has none.
    #[inline(always)]
    pub fn flow_hash(&self) -> u32 {
        // SAFETY: a helper call on the program's own context.
        unsafe { aya_ebpf::helpers::bpf_get_hash_recalc(self.ctx.skb.skb) }
    }

    /// Returns the address family, by the Ethernet type in the packet's metadata.
    #[inline(always)]
    pub fn family(&self) -> Result<Family, Decision> {
        // SAFETY: as in `segments`.
        match u16::from_be(unsafe { (*self.ctx.skb.skb).protocol } as u16) {
            ETH_P_IP => Ok(Family::V4),
            ETH_P_IPV6 => Ok(Family::V6),
            _ => Err(Verdict::DropNotIp.into()),
        }
    }

    /// Reads the IP header at offset `l3`. Checks that it is sound and that the packet is as long as the header claims.
    #[inline(always)]
    pub fn ip<I: Ip>(&self, l3: usize) -> Result<I, Decision> {
        let header: I = self.ctx.load(l3).map_err(|_| Verdict::DropMalformed)?;
        // The length field of an aggregate may be that of its first segment; only the kernel's length is reliable.
        let plausible = self.gso_size() != 0 || header.total_len() <= self.len().wrapping_sub(l3 as u32);
        if header.is_sound() && plausible { Ok(header) } else { Err(Verdict::DropMalformed.into()) }
    }

    /// Returns the destination port (host order) of the packet with its IP header at `l3`, if it is
    /// TCP and not fragmented.
    #[inline(always)]
    pub fn tcp_port<I: Ip>(&self, l3: usize, header: &I) -> Option<u16> {
        let port: [u8; 2] = self.ctx.load(l3 + header.tcp_offset()? + 2).ok()?;
        Some(u16::from_be_bytes(port))
    }

    /// Reports whether the packet, or each segment of an aggregate, has at most `mtu` bytes from its IP header on.
    #[inline(always)]
    pub fn fits<I: Ip>(&self, l3: usize, header: &I, mtu: u32) -> bool {
        let payload = self.gso_size();
        if payload == 0 {
            return self.len().wrapping_sub(l3 as u32) <= mtu;
        }
        payload + self.headers_len(l3, header) <= mtu
    }

    /// Returns the length of IP and transport header of an aggregate in bytes. Aggregates are TCP or UDP (8 bytes).
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

    /// Returns the raw context, for helpers without a method in aya.
    #[inline(always)]
    pub fn raw(&self) -> *mut aya_ebpf::bindings::__sk_buff {
        self.ctx.as_ptr().cast()
    }
}
