//! Attaches the programs and chooses the tier of a node with a tunnel.

use super::{Reconciler, report::Outcome};
use crate::{
    bpf::{self, Hook},
    config::Tier,
    link::{NetDevice, Uplink},
    names,
    plan::Plan,
    state::Indexes,
};

impl Reconciler {
    /// Attaches the programs of Raven's own devices. Called before the tunnel has peers: without a program, the stack would
    /// forward their packets to members in clear. A program without map entries drops them. Returns false if that of the
    /// tunnel could not be attached.
    pub(super) async fn attach_device_programs(&mut self, indexes: Indexes, outcome: &mut Outcome) -> bool {
        let mut guarded = true;
        for (hook, device, index) in [
            (Hook::OverlayIngress, names::OVERLAY, Some(indexes.overlay)),
            (Hook::OverlayEgress, names::OVERLAY, Some(indexes.overlay)),
            (Hook::TunnelIngress, names::TUNNEL, indexes.tunnel),
            (Hook::TunnelEgress, names::TUNNEL, indexes.tunnel),
        ] {
            let Some(index) = index else { continue };
            self.bpf.detach_except(hook, [index]);
            let attached = outcome.keep(self.bpf.attach(hook, device, index));
            outcome.change += attached.unwrap_or_default();
            guarded &= attached.is_some() || hook != Hook::TunnelIngress;
            if let Some(before) = self.programs_before(hook, device, index).await {
                outcome.surroundings.push(format!("{before}; keep other programs off {device}"));
            }
        }
        guarded
    }

    /// Attaches the programs of the uplink, on a node with a tunnel. Called after the maps are filled: an XDP program
    /// without entries would drop the packets of its pool.
    pub(super) async fn attach_uplink_programs(
        &mut self,
        plan: &Plan,
        uplink: &Uplink,
        indexes: Indexes,
        outcome: &mut Outcome,
    ) {
        if indexes.tunnel.is_none() {
            return self.detach_uplink_programs(uplink);
        }
        // `uplink_ingress` reads the metadata that `uplink_xdp` writes, so it is attached first and detached last.
        let pool_devices = uplink.pool_devices();
        let mut fast = Vec::new();
        let mut obstacles = Vec::new();
        for device in &pool_devices {
            let attached = outcome.keep(self.bpf.attach(Hook::UplinkIngress, &device.name, device.index));
            outcome.change += attached.unwrap_or_default();
            match self.obstacle(plan, device, attached.is_some()).await {
                Some(obstacle) => obstacles.push(obstacle),
                None => fast.push(device),
            }
        }
        if let Some(wan) = &uplink.wan {
            outcome.take(self.bpf.attach(Hook::UplinkIngress, &wan.name, wan.index));
        }
        self.bpf.detach_except(Hook::UplinkXdp, fast.iter().map(|device| device.index));
        self.bpf.detach_except(Hook::UplinkIngress, pool_devices.iter().chain(&uplink.wan).map(|device| device.index));
        for device in fast {
            match self.bpf.attach(Hook::UplinkXdp, &device.name, device.index) {
                Ok(change) => outcome.change += change,
                // Not a failure: the fallback tier forwards.
                Err(e) => obstacles.push(e.to_string()),
            }
        }
        // Packets of members come out of the tunnel.
        if plan.config.encrypted {
            return;
        }
        let fallback = if self.may_redirect() { "tc" } else { "stack" };
        let is_fast = self.bpf.is_attached(Hook::UplinkXdp, uplink.index);
        outcome.tier = Some(if is_fast { "xdp+tc" } else { fallback });
        outcome.tier_reason = obstacles.into_iter().next();
    }

    /// Why the fast tier cannot be used on a device: packets that XDP decapsulates must reach `uplink_ingress`.
    async fn obstacle(&self, plan: &Plan, device: &NetDevice, has_ingress: bool) -> Option<String> {
        match self.settings.tier {
            Tier::Tc => Some("--tier=tc".to_owned()),
            Tier::Auto if plan.config.address.is_ipv6() => {
                Some("the overlay of this pool uses IPv6, and uplink_xdp decapsulates only IPv4".to_owned())
            }
            Tier::Auto if !has_ingress => Some(format!("{} is not attached", Hook::UplinkIngress.program())),
            Tier::Auto => self.programs_before(Hook::UplinkIngress, &device.name, device.index).await,
        }
    }

    fn detach_uplink_programs(&mut self, uplink: &Uplink) {
        for hook in [Hook::UplinkXdp, Hook::UplinkIngress] {
            self.bpf.detach(hook);
            if !self.settings.tcx() && hook == Hook::UplinkIngress {
                let devices = uplink.pool_devices();
                devices.iter().chain(&uplink.wan).for_each(|device| bpf::detach_filter(hook, &device.name));
            }
        }
    }

    /// A sentence that names the programs of others that run before the program of `hook`, if there are any.
    async fn programs_before(&self, hook: Hook, device: &str, index: u32) -> Option<String> {
        let mut before = self.bpf.programs_before(hook, device, index);
        if !self.settings.tcx() {
            before.extend(self.links.filters_before(index, hook.is_egress(), hook.program()).await);
        }
        let direction = if hook.is_egress() { "egress" } else { "ingress" };
        (!before.is_empty()).then(|| {
            format!(
                "at TC {direction} of {device}, {} runs before {}, which does not see packets that get a final verdict there (Cilium below Linux 6.6: cilium \
                 config set bpf-filter-priority 2)",
                before.join(", "),
                hook.program()
            )
        })
    }
}
