//! Native XDP of the uplink of a node with a tunnel: removes the outer header of overlay packets from nodes of this pool,
//! before an skb is allocated, and marks them in the XDP metadata for [`mod@crate::uplink_ingress`]. Overlay packets of
//! other senders are dropped.
//!
//! Unwraps only packets that can be redirected into the tunnel. All others (a packet of another pool for this
//! node, an exhausted TTL, oversized packets, congestion marks, IP options, fragments) pass unchanged to `raven0`
//! and the fallback tier.

use aya_ebpf::{
    helpers::{bpf_xdp_adjust_head, bpf_xdp_adjust_meta},
    programs::XdpContext,
};
use raven_common::{
    OVERLAY_OVERHEAD, OVERLAY_PORT, OVERLAY_VNI, Verdict,
    header::{ETH_LEN, ETH_P_IP, ETH_P_IPV6, Ethernet, IPPROTO_UDP, Ip, Ipv4, Ipv6, UdpVxlan},
    tables::{CONFIG_ENCRYPTED, Config, GatewayId, NODE_IS_GATEWAY, Path, UNWRAPPED_MAGIC, Unwrapped},
};

use crate::{
    count::Decision,
    frame,
    guard::{self, Message},
    maps::{self, Tables},
};

/// Offset of the UDP header in an overlay frame whose outer IPv4 header has no options.
const UDP: usize = ETH_LEN + Ipv4::LEN;
/// Offset of the UDP header in a frame without IPv6 extension headers.
const UDP6: usize = ETH_LEN + Ipv6::LEN;
/// Length of a UDP header in bytes.
const UDP_LEN: usize = 8;
const INNER_ETHERNET: usize = OVERLAY_OVERHEAD;
const INNER_IP: usize = INNER_ETHERNET + ETH_LEN;

/// Value of the ECN field for "congestion experienced" (RFC 3168).
const ECN_CE: u8 = 3;

/// Returns the reason to drop the packet, or `None` if it passes, unwrapped or not.
#[inline(always)]
pub fn run(ctx: &XdpContext) -> Option<Decision> {
    unwrap(ctx).err().flatten()
}

/// Error type of the steps: a drop with its reason, or `None` to pass the packet unchanged.
type Unchanged = Option<Decision>;

#[inline(always)]
fn drop<T>(verdict: Verdict) -> Result<T, Unchanged> {
    Err(Some(verdict.into()))
}

#[inline(always)]
fn unwrap(ctx: &XdpContext) -> Result<(), Unchanged> {
    let config = maps::config();
    // A member has no tunnel, unless the pool has encryption.
    if config.tunnel_ifindex == 0 {
        return Err(None);
    }
    let ethertype = u16::from_be_bytes(frame::read::<Ethernet>(ctx, 0).ok_or(None)?.ethertype);
    // A single call of the guard, because the verifier follows its instructions for each one.
    let message = match ethertype {
        ETH_P_IPV6 => message_ipv6(ctx, &config).ok_or(None)?,
        ETH_P_IP => {
            let (outer, port) = udp_for_node(ctx, &config).ok_or(None)?;
            if port != config.tunnel_port as u16 {
                return unwrap_ipv4(ctx, &config, &outer, port);
            }
            let len = (outer.total_len() as u16).wrapping_sub((Ipv4::LEN + UDP_LEN) as u16);
            TunnelPacket { source: outer.sender(), offset: UDP + UDP_LEN, len }
        }
        _ => return Err(None),
    };
    Err(guard_tunnel(ctx, &message).map(Decision::from))
}

#[inline(always)]
fn unwrap_ipv4(ctx: &XdpContext, config: &Config, outer: &Ipv4, port: u16) -> Result<(), Unchanged> {
    if port != OVERLAY_PORT {
        return Err(None);
    }
    // The overlay carries intercepted connections only, which the stack delivers to the proxy.
    if config.flags & CONFIG_ENCRYPTED != 0 {
        return Err(pass_if_from_pool(outer));
    }
    let Some(udp) = frame::read::<UdpVxlan>(ctx, UDP) else { return Err(pass_if_from_pool(outer)) };
    // The kernel's stack handles other network identifiers, and congestion marks, which must be merged (RFC 6040).
    if udp.vni() != OVERLAY_VNI || udp.flags != 0x08 || outer.tos & ECN_CE == ECN_CE {
        return Err(pass_if_from_pool(outer));
    }
    let Some(ethernet) = frame::read::<Ethernet>(ctx, INNER_ETHERNET) else {
        return Err(pass_if_from_pool(outer).or(Some(Verdict::DropMalformed.into())));
    };
    match u16::from_be_bytes(ethernet.ethertype) {
        ETH_P_IP => forward::<Ipv4>(ctx, config, outer),
        ETH_P_IPV6 => forward::<Ipv6>(ctx, config, outer),
        _ => Err(pass_if_from_pool(outer).or(Some(Verdict::DropNotIp.into()))),
    }
}

/// For a packet that is not unwrapped: passes it if a node of this pool sent it, and drops it otherwise.
#[inline(always)]
fn pass_if_from_pool(outer: &Ipv4) -> Unchanged {
    maps::node(&outer.source).is_none().then(|| Verdict::DropOuterNotInPool.into())
}

/// Returns outer header and destination port (host order) of a UDP packet for this gateway node.
#[inline(always)]
fn udp_for_node(ctx: &XdpContext, config: &Config) -> Option<(Ipv4, u16)> {
    let ip: Ipv4 = frame::read(ctx, ETH_LEN)?;
    if ip.version_ihl != 0x45 || ip.protocol != IPPROTO_UDP || ip.is_fragment() || !ip.is_to(config) {
        return None;
    }
    Some((ip, destination_port(ctx, UDP)?))
}

/// A UDP packet to the tunnel's port.
struct TunnelPacket {
    source: [u8; 16],
    /// Where its payload starts in the frame.
    offset: usize,
    /// Length of the payload in bytes.
    len: u16,
}

#[inline(always)]
fn message_ipv6(ctx: &XdpContext, config: &Config) -> Option<TunnelPacket> {
    // The port comes first: most packets have another one and need no lookup.
    if destination_port(ctx, UDP6)? != config.tunnel_port as u16 {
        return None;
    }
    let ip: Ipv6 = frame::read(ctx, ETH_LEN)?;
    if ip.next_header != IPPROTO_UDP || !ip.is_to(config) {
        return None;
    }
    let len = u16::from_be_bytes(ip.payload_len).wrapping_sub(UDP_LEN as u16);
    Some(TunnelPacket { source: ip.sender(), offset: UDP6 + UDP_LEN, len })
}

/// Reads the destination port of the UDP header at `udp`, in host order.
#[inline(always)]
fn destination_port(ctx: &XdpContext, udp: usize) -> Option<u16> {
    frame::read::<[u8; 2]>(ctx, udp + 2).map(u16::from_be_bytes)
}

/// Returns the guard's reason to drop a packet to the tunnel's port, or `None`.
#[inline(always)]
fn guard_tunnel(ctx: &XdpContext, packet: &TunnelPacket) -> Option<Verdict> {
    let TunnelPacket { source, offset, len } = *packet;
    let Some(head) = frame::read(ctx, offset) else { return Some(Verdict::DropNotWireguard) };
    guard::refuse(&Message { source, head, len, count: 1 }, |initiation| {
        let from = frame::at(ctx, offset)?;
        // SAFETY: `at` checked the bounds; the frame and the map's entry do not overlap. Not by value, which would need the stack.
        unsafe { core::ptr::copy_nonoverlapping(from, initiation, 1) };
        Some(())
    })
}

/// Unwraps the inner packet and decrements its TTL, if it can be redirected into the tunnel.
#[inline(always)]
fn forward<I: Tables>(ctx: &XdpContext, config: &Config, outer: &Ipv4) -> Result<(), Unchanged> {
    let Some(header) = frame::read::<I>(ctx, INNER_IP) else {
        return Err(pass_if_from_pool(outer).or(Some(Verdict::DropMalformed.into())));
    };
    let available = (ctx.data_end() - ctx.data()) as u32;
    if !header.is_sound() || header.total_len() + INNER_IP as u32 > available {
        return Err(pass_if_from_pool(outer).or(Some(Verdict::DropMalformed.into())));
    }
    let gateway = gateway_of(config, outer, &header)?;
    if header.ttl() <= 1 || header.total_len() > config.tunnel_mtu {
        return Err(None);
    }
    strip(ctx, gateway, &header).ok_or(None)
}

/// Returns the Gateway of the inner destination from the cache, or looks it up with all checks and caches it.
#[inline(always)]
fn gateway_of<I: Tables>(config: &Config, outer: &Ipv4, header: &I) -> Result<GatewayId, Unchanged> {
    let path = header.path().ok_or(None)?;
    // SAFETY: this CPU's own entry, which always exists; XDP programs do not interrupt each other on a CPU.
    let entry = unsafe { &mut *path };
    if entry.generation == config.generation
        && entry.outer == outer.source
        && entry.source == header.source()
        && entry.destination == header.destination()
    {
        return Ok(entry.gateway);
    }
    let Some(node) = maps::node(&outer.source) else { return drop(Verdict::DropOuterNotInPool) };
    // A packet of another pool, forwarded by another gateway node, passes to the stack.
    if node.flags & NODE_IS_GATEWAY != 0 {
        return Err(None);
    }
    if I::local(header.source()).is_none_or(|owner| owner.node != outer.source) {
        return drop(Verdict::DropSpoofedInner);
    }
    let gateway = I::remote(header.destination()).ok_or(None)?.gateway;
    *entry = Path {
        generation: config.generation,
        gateway,
        outer: outer.source,
        source: header.source(),
        destination: header.destination(),
    };
    Ok(gateway)
}

/// Decrements TTL or hop limit, because a redirect is a router's hop. The caller has checked that it is above 1.
#[inline(always)]
fn take_hop<I: Tables>(ctx: &XdpContext, header: &I) -> Option<()> {
    let hop = header.hop();
    if I::LEN == Ipv4::LEN {
        // SAFETY: `at` checked the bounds; nothing else points into the frame.
        unsafe { *frame::at::<[u8; 4]>(ctx, INNER_IP + hop.offset)? = hop.bytes };
    } else {
        // SAFETY: as above.
        unsafe { *frame::at::<u8>(ctx, INNER_IP + hop.offset)? = hop.bytes[0] };
    }
    Some(())
}

/// Decrements the TTL and removes the outer header. Reserves the metadata first: if the driver does not support it, the
/// packet is still unchanged and passes.
#[inline(always)]
fn strip<I: Tables>(ctx: &XdpContext, gateway: GatewayId, header: &I) -> Option<()> {
    // SAFETY: a helper call on the program's own context; no pointer into the frame lives across it.
    if unsafe { bpf_xdp_adjust_meta(ctx.ctx, -(size_of::<Unwrapped>() as i32)) } != 0 {
        return None;
    }
    take_hop(ctx, header)?;
    let macs: [u8; 12] = frame::read(ctx, 0)?;
    // The inner frame takes over the outer MAC addresses, so that the stack accepts it if it is not redirected.
    // SAFETY: `at` checked the bounds; nothing else points into the frame.
    unsafe { *frame::at::<[u8; 12]>(ctx, INNER_ETHERNET)? = macs };
    // SAFETY: helper calls on the program's own context; no pointer into the frame lives across them.
    unsafe {
        // Fails only if less than an Ethernet header would remain; the frame also contains an IP header.
        if bpf_xdp_adjust_head(ctx.ctx, OVERLAY_OVERHEAD as i32) != 0 {
            bpf_xdp_adjust_meta(ctx.ctx, size_of::<Unwrapped>() as i32);
            return None;
        }
    }
    let start = ctx.metadata();
    if start + size_of::<Unwrapped>() > ctx.metadata_end() {
        return None;
    }
    // SAFETY: checked above to lie in the metadata area, which the helper aligns to 4.
    unsafe { *(start as *mut Unwrapped) = Unwrapped { magic: UNWRAPPED_MAGIC, gateway } };
    Some(())
}
