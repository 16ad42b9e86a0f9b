//! Attaches the programs and chooses the tier of a gateway node.

use super::{Reconciler, report::Outcome};
use crate::{
    bpf::{self, Hook},
    config::Tier,
    link::Uplink,
    names,
    plan::Plan,
    state::{Indexes, Role},
};

impl Reconciler {
    /// Attaches all programs that the plan needs. Called after the maps are filled: an XDP program without entries
    /// would drop the packets of its pool.
    pub(super) async fn attach_programs(
        &mut self,
        plan: &Plan,
        uplink: &Uplink,
        indexes: Indexes,
        outcome: &mut Outcome,
    ) {
        for (hook, device, index) in [
            (Hook::OverlayIngress, names::OVERLAY, Some(indexes.overlay)),
            (Hook::OverlayEgress, names::OVERLAY, Some(indexes.overlay)),
            (Hook::TunnelIngress, names::TUNNEL, indexes.tunnel),
            (Hook::TunnelEgress, names::TUNNEL, indexes.tunnel),
        ] {
            let Some(index) = index else { continue };
            outcome.take(self.bpf.attach(hook, device, index));
            if let Some(before) = self.programs_before(hook, device, index).await {
                outcome.surroundings.push(format!("{before}; keep other programs off {device}"));
            }
        }
        if indexes.tunnel.is_none() || plan.role != Role::Gateway {
            return self.detach_gateway_programs(uplink);
        }
        // `uplink_ingress` reads the metadata that `uplink_xdp` writes, so it is attached first.
        let attached = outcome.keep(self.bpf.attach(Hook::UplinkIngress, &uplink.name, uplink.index));
        outcome.change += attached.unwrap_or_default();
        let obstacle = match self.settings.tier {
            Tier::Tc => Some("--tier=tc".to_owned()),
            Tier::Auto if plan.config.address.is_ipv6() => Some(
                "the nodes of this pool have only IPv6 addresses, and uplink_xdp handles overlay packets over IPv4"
                    .to_owned(),
            ),
            Tier::Auto if attached.is_none() => Some(format!("{} is not attached", Hook::UplinkIngress.program())),
            Tier::Auto => self.programs_before(Hook::UplinkIngress, &uplink.name, uplink.index).await,
        };
        self.choose_tier(uplink, obstacle, outcome);
    }

    fn detach_gateway_programs(&mut self, uplink: &Uplink) {
        for hook in [Hook::UplinkXdp, Hook::UplinkIngress, Hook::TunnelIngress, Hook::TunnelEgress] {
            self.bpf.detach(hook);
            if !self.settings.tcx() && hook == Hook::UplinkIngress {
                bpf::detach_filter(hook, &uplink.name);
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

    /// Uses the fast tier unless there is an obstacle: packets that XDP decapsulates must reach `uplink_ingress`.
    fn choose_tier(&mut self, uplink: &Uplink, obstacle: Option<String>, outcome: &mut Outcome) {
        let fallback = if self.may_redirect() { "tc" } else { "stack" };
        if obstacle.is_some() {
            self.bpf.detach(Hook::UplinkXdp);
            (outcome.tier, outcome.tier_reason) = (Some(fallback), obstacle);
            return;
        }
        match self.bpf.attach(Hook::UplinkXdp, &uplink.name, uplink.index) {
            Ok(change) => {
                outcome.change += change;
                outcome.tier = Some("xdp+tc");
            }
            // Not a failure: the fallback tier forwards.
            Err(e) => (outcome.tier, outcome.tier_reason) = (Some(fallback), Some(e.to_string())),
        }
    }
}
