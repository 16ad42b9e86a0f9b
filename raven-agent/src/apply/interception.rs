//! Applies the interception: connections to kubelets of edge nodes, by address.

use super::{Reconciler, report::Outcome};
use crate::{
    names,
    state::{InterceptTo, Interception},
};

impl Reconciler {
    /// The receiver of the connections is set up before the routes that lead to it, and removed after them.
    pub(super) async fn apply_interception(&mut self, want: Option<&Interception>, outcome: &mut Outcome) {
        let here = want.is_some_and(|interception| interception.to == InterceptTo::Here);
        if want.is_some() {
            outcome.take(self.bpf.set_kubelets(want));
        }
        let listener = self.listener.as_ref().filter(|_| here);
        if let Some(listener) = listener {
            match self.bpf.intercept(listener) {
                Ok(change) => outcome.change += change,
                // Requests by name still work, and L3 is not affected: reported, but no failure.
                Err(e) => {
                    return outcome.surroundings.push(format!(
                        "kubelets of edge nodes cannot be reached by address on this node, only by name: {e}"
                    ));
                }
            }
        }
        let overlay = match want.filter(|_| !here) {
            Some(_) => self.links.find(names::OVERLAY).await.ok().flatten().map(|found| found.index),
            None => None,
        };
        let received = listener.is_some();
        outcome.take(self.links.ensure_interception(want.filter(|_| received || !here), overlay).await);
        if !received {
            outcome.take(self.bpf.stop_intercepting());
        }
        if want.is_none() {
            outcome.take(self.bpf.set_kubelets(None));
        }
    }
}
