//! Native XDP of a gateway node's uplink: an overlay packet from a node of this pool loses its outer header here, before
//! it is an skb, and a note in the XDP metadata tells [`crate::uplink_ingress`] so. Strangers are dropped.
//!
//! Unwraps only what surely goes into the tunnel; everything else (another pool's packet for this node, a spent TTL, too
//! big, congestion marks, IP options, fragments) passes untouched, to `raven0` and the fallback tier.

use aya_ebpf::{
    helpers::{bpf_xdp_adjust_head, bpf_xdp_adjust_meta},
    programs::XdpContext,
};
use raven_common::{
    OVERLAY_OVERHEAD, OVERLAY_PORT, OVERLAY_VNI, Verdict,
    header::{ETH_LEN, ETH_P_IP, ETH_P_IPV6, Ethernet, IPPROTO_UDP, Ip, Ipv4, Ipv6, UdpVxlan},
    tables::{Config, GatewayId, NODE_IS_GATEWAY, Path, UNWRAPPED_MAGIC, Unwrapped},
};

use crate::{
    access,
    count::Seen,
    guard::{self, Message},
    maps::{self, Tables},
};

/// Offsets in an overlay frame whose outer IPv4 header has no options.
const UDP: usize = ETH_LEN + Ipv4::LEN;
/// Length of a UDP header.
const UDP_LEN: usize = 8;
const INNER_ETHERNET: usize = OVERLAY_OVERHEAD;
const INNER_IP: usize = INNER_ETHERNET + ETH_LEN;

/// ECN field: congestion experienced (RFC 3168).
const ECN_CE: u8 = 3;

/// The packet is to be dropped, and why; or `None`: it passes, unwrapped or not.
#[inline(always)]
pub fn run(ctx: &XdpContext) -> Option<Seen> {
    unwrap(ctx).err().flatten()
}

/// `Err(None)`: passes untouched.
type Untouched = Option<Seen>;

#[inline(always)]
fn drop<T>(verdict: Verdict) -> Result<T, Untouched> {
    Err(Some(verdict.into()))
}

#[inline(always)]
fn unwrap(ctx: &XdpContext) -> Result<(), Untouched> {
    let config = maps::config();
    let (outer, port) = udp_for_us(ctx, &config).ok_or(None)?;
    if port == config.tunnel_port as u16 {
        return Err(guard_tunnel(ctx, &outer).map(Seen::from));
    }
    if port != OVERLAY_PORT {
        return Err(None);
    }
    let Some(udp) = access::read::<UdpVxlan>(ctx, UDP) else { return Err(stranger(&outer)) };
    // Other network identifiers, and congestion marks that must be merged (RFC 6040), are the kernel's business.
    if udp.vni() != OVERLAY_VNI || udp.flags != 0x08 || outer.tos & ECN_CE == ECN_CE {
        return Err(stranger(&outer));
    }
    let Some(ethernet) = access::read::<Ethernet>(ctx, INNER_ETHERNET) else {
        return Err(stranger(&outer).or(Some(Verdict::DropMalformed.into())));
    };
    match u16::from_be_bytes(ethernet.ethertype) {
        ETH_P_IP => forward::<Ipv4>(ctx, &config, &outer),
        ETH_P_IPV6 => forward::<Ipv6>(ctx, &config, &outer),
        _ => Err(stranger(&outer).or(Some(Verdict::DropNotIp.into()))),
    }
}

/// A packet that is none of ours passes if a node of this pool sent it, and is dropped if not.
#[inline(always)]
fn stranger(outer: &Ipv4) -> Untouched {
    maps::node(&outer.source).is_none().then(|| Verdict::DropOuterNotInPool.into())
}

/// Outer header and destination port (host order) of a UDP packet for this gateway node.
#[inline(always)]
fn udp_for_us(ctx: &XdpContext, config: &Config) -> Option<(Ipv4, u16)> {
    let ethernet: Ethernet = access::read(ctx, 0)?;
    if ethernet.ethertype != ETH_P_IP.to_be_bytes() {
        return None;
    }
    let ip: Ipv4 = access::read(ctx, ETH_LEN)?;
    if ip.version_ihl != 0x45 || ip.protocol != IPPROTO_UDP || ip.is_fragment() || ip.destination != config.node {
        return None;
    }
    let ports: [u8; 4] = access::read(ctx, UDP)?;
    (config.tunnel_ifindex != 0).then_some((ip, u16::from_be_bytes([ports[2], ports[3]])))
}

/// Why a packet for the tunnel's port is to be dropped, if it is.
#[inline(always)]
fn guard_tunnel(ctx: &XdpContext, outer: &Ipv4) -> Option<Verdict> {
    let Some(head) = access::read(ctx, UDP + UDP_LEN) else { return Some(Verdict::DropNotWireguard) };
    let len = (outer.total_len() as u16).wrapping_sub((Ipv4::LEN + UDP_LEN) as u16);
    guard::refuse(&Message { source: outer.source, head, len: Some(len) })
}

/// Unwraps the inner packet, if it can go into the tunnel as it is, and takes its hop.
#[inline(always)]
fn forward<I: Tables>(ctx: &XdpContext, config: &Config, outer: &Ipv4) -> Result<(), Untouched> {
    let Some(header) = access::read::<I>(ctx, INNER_IP) else { return Err(stranger(outer).or(Some(Verdict::DropMalformed.into()))) };
    let available = (ctx.data_end() - ctx.data()) as u32;
    if !header.is_sound() || header.total_len() + INNER_IP as u32 > available {
        return Err(stranger(outer).or(Some(Verdict::DropMalformed.into())));
    }
    let gateway = gateway_of(config, outer, &header)?;
    if header.ttl() <= 1 || header.total_len() > config.tunnel_mtu {
        return Err(None);
    }
    strip(ctx, gateway, &header).ok_or(None)
}

/// The Gateway that the inner packet is for: remembered, or looked up with all checks, and remembered then.
#[inline(always)]
fn gateway_of<I: Tables>(config: &Config, outer: &Ipv4, header: &I) -> Result<GatewayId, Untouched> {
    let path = header.path().ok_or(None)?;
    // SAFETY: this CPU's own entry, which always exists; XDP programs do not interrupt each other on a CPU.
    let known = unsafe { &mut *path };
    if known.generation == config.generation
        && known.outer == outer.source
        && known.source == header.source()
        && known.destination == header.destination()
    {
        return Ok(known.gateway);
    }
    let Some(node) = maps::node(&outer.source) else { return drop(Verdict::DropOuterNotInPool) };
    // Another pool's packet, brought by another gateway node: for the stack.
    if node.flags & NODE_IS_GATEWAY != 0 {
        return Err(None);
    }
    if I::local(header.source()).is_none_or(|owner| owner.node != outer.source) {
        return drop(Verdict::DropSpoofedInner);
    }
    let gateway = I::remote(header.destination()).ok_or(None)?.gateway;
    *known =
        Path { generation: config.generation, gateway, outer: outer.source, source: header.source(), destination: header.destination() };
    Ok(gateway)
}

/// A redirect is still a router's hop. The caller knows that there is one left to take.
#[inline(always)]
fn take_hop<I: Tables>(ctx: &XdpContext, header: &I) -> Option<()> {
    let hop = header.hop();
    if I::LEN == Ipv4::LEN {
        // SAFETY: `at` checked the bounds; nothing else points into the frame.
        unsafe { *access::at::<[u8; 4]>(ctx, INNER_IP + hop.offset)? = hop.bytes };
    } else {
        // SAFETY: as above.
        unsafe { *access::at::<u8>(ctx, INNER_IP + hop.offset)? = hop.bytes[0] };
    }
    Some(())
}

/// Takes the hop and the outer header off. Metadata first: where the driver has none, the packet is still whole and passes as it was.
#[inline(always)]
fn strip<I: Tables>(ctx: &XdpContext, gateway: GatewayId, header: &I) -> Option<()> {
    // SAFETY: a helper call on the program's own context; no pointer into the frame lives across it.
    if unsafe { bpf_xdp_adjust_meta(ctx.ctx, -(size_of::<Unwrapped>() as i32)) } != 0 {
        return None;
    }
    take_hop(ctx, header)?;
    let macs: [u8; 12] = access::read(ctx, 0)?;
    // The inner frame takes over the outer addresses: it is for this device, and the stack may have to take it.
    // SAFETY: `at` checked the bounds; nothing else points into the frame.
    unsafe { *access::at::<[u8; 12]>(ctx, INNER_ETHERNET)? = macs };
    // SAFETY: helper calls on the program's own context; no pointer into the frame lives across them.
    unsafe {
        // Refused only where less than an Ethernet header would be left, and there is an IP header behind it.
        if bpf_xdp_adjust_head(ctx.ctx, OVERLAY_OVERHEAD as i32) != 0 {
            bpf_xdp_adjust_meta(ctx.ctx, size_of::<Unwrapped>() as i32);
            return None;
        }
    }
    let start = ctx.metadata();
    if start + size_of::<Unwrapped>() > ctx.metadata_end() {
        return None;
    }
    // SAFETY: checked above to lie in the metadata area, which starts at a multiple of 4 (the helper asks for that).
    unsafe { *(start as *mut Unwrapped) = Unwrapped { magic: UNWRAPPED_MAGIC, gateway } };
    Some(())
}
