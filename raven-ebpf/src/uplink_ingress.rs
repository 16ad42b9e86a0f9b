//! TC ingress of the uplink of a node with a tunnel: redirects packets that [`mod@crate::uplink_xdp`] has unwrapped, and GRO may
//! have merged, into the tunnel. They bypass UDP receive, the VXLAN device, routing tables, netfilter and conntrack.
//!
//! The program receives every packet of the uplink and passes unrelated ones after three instructions. Where no XDP
//! program of Raven is attached, it also runs the guard.

use raven_common::{
    OVERLAY_PORT, Verdict,
    header::{ETH_LEN, IPPROTO_UDP, Ip, Ipv4, Ipv6},
    tables::{CONFIG_TC_GUARD, GatewayId, UNWRAPPED_MAGIC, Unwrapped},
};

use crate::{
    count::Decision,
    forward,
    guard::{self, Message},
    maps::{self, Tables},
    parse::{Family, Skb},
};

/// Returns `None` for unrelated packets.
#[inline(always)]
pub fn run(skb: &Skb) -> Option<Result<Decision, Decision>> {
    let Some(gateway) = unwrapped(skb) else { return refuse(skb).map(|verdict| Err(verdict.into())) };
    // XDP has checked the packet and decremented its TTL. If the tunnel was removed since, the stack takes the packet.
    let config = maps::config();
    if config.tunnel_ifindex == 0 {
        return Some(Err(Decision::new(Verdict::StackNoRedirect, gateway)));
    }
    forward::redirect(config.tunnel_ifindex);
    Some(Ok(Decision::new(Verdict::ToTunnelFast, gateway)))
}

/// Reads the metadata that XDP stored in front of the packet.
///
/// It is never written: for a direct packet write, the kernel makes a private copy if another program also reads the
/// packet (tcpdump, a DHCP client), and that copy lacks the metadata. No program behind this one can misinterpret it,
/// because a packet with metadata is redirected as long as a tunnel exists.
#[inline(always)]
fn unwrapped(skb: &Skb) -> Option<GatewayId> {
    // SAFETY: the context is valid; the verifier rewrites the loads.
    let (start, end) = unsafe { ((*skb.raw()).data_meta as usize, (*skb.raw()).data as usize) };
    if start + size_of::<Unwrapped>() > end {
        return None;
    }
    // SAFETY: the bounds were checked, the area is aligned to 4, and any bytes are a valid value.
    let metadata = unsafe { *(start as *const Unwrapped) };
    (metadata.magic == UNWRAPPED_MAGIC).then_some(metadata.gateway)
}

/// Runs the guard where no XDP program of Raven is attached: the same checks of UDP packets for this node.
#[inline(always)]
fn refuse(skb: &Skb) -> Option<Verdict> {
    let config = maps::config();
    if config.flags & CONFIG_TC_GUARD == 0 {
        return None;
    }
    let (source, udp, len) = match skb.family() {
        Ok(Family::V4) => {
            let udp = ETH_LEN + Ipv4::LEN;
            let ip: Ipv4 = skb.ctx.load(ETH_LEN).ok()?;
            if ip.version_ihl != 0x45 || ip.protocol != IPPROTO_UDP || ip.is_fragment() || !ip.is_to(&config) {
                return None;
            }
            match destination_port(skb, udp)? {
                OVERLAY_PORT => return maps::node(&ip.source).is_none().then_some(Verdict::DropOuterNotInPool),
                port if u32::from(port) == config.tunnel_port => {}
                _ => return None,
            }
            (ip.sender(), udp, ip.total_len().wrapping_sub(Ipv4::LEN as u32))
        }
        Ok(Family::V6) => {
            let udp = ETH_LEN + Ipv6::LEN;
            // The port comes first: most packets have another one and need no lookup.
            if u32::from(destination_port(skb, udp)?) != config.tunnel_port {
                return None;
            }
            let ip: Ipv6 = skb.ctx.load(ETH_LEN).ok()?;
            if ip.next_header != IPPROTO_UDP || !ip.is_to(&config) {
                return None;
            }
            (ip.sender(), udp, ip.total_len().wrapping_sub(Ipv6::LEN as u32))
        }
        Err(_) => return None,
    };
    let payload = udp + 8;
    let Ok(head) = skb.ctx.load(payload) else { return Some(Verdict::DropNotWireguard) };
    let len = if skb.is_aggregate() { skb.gso_size() } else { len.wrapping_sub(8) } as u16;
    let message = Message { source, head, len, count: skb.segments() };
    guard::refuse(&message, |initiation| skb.copy(payload, initiation))
}

/// Reads the destination port of the UDP header at `udp`, in host order.
#[inline(always)]
fn destination_port(skb: &Skb, udp: usize) -> Option<u16> {
    skb.ctx.load::<[u8; 2]>(udp + 2).ok().map(u16::from_be_bytes)
}
