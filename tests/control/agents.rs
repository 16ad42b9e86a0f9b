//! Tests of nodes on which no agent works, although their kubelets report them Ready.

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams};
use raven_api::{AGENT_SERVICE_ACCOUNT, DEFAULT_NAMESPACE, GatewayNode};
use raven_tests::{eventually, test_name};
use serde_json::json;

use crate::fixture::{Fixture, SOON, elects, has_condition, run};

/// Writes the Pod of a node's agent with this readiness, as DaemonSet controller and kubelet do.
async fn put_agent(fixture: &Fixture, node: &str, ready: bool) -> Result<()> {
    let pods = agents(fixture);
    let (name, parameters) = (format!("raven-agent-{node}"), PatchParams::apply("a-kubelet").force());
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/name": "raven-agent"}},
        "spec": {
            "nodeName": node, "serviceAccountName": AGENT_SERVICE_ACCOUNT, "tolerations": [{"operator": "Exists"}],
            "containers": [{"name": "agent", "image": "raven-agent:test"}],
        },
    });
    pods.patch(&name, &parameters, &Patch::Apply(&pod)).await.with_context(|| format!("write Pod {name}"))?;
    let status = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
        "status": {"conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}]},
    });
    pods.patch_status(&name, &parameters, &Patch::Apply(&status)).await.map(drop).context("write the Pod's status")
}

fn agents(fixture: &Fixture) -> Api<Pod> {
    Api::namespaced(fixture.lab.cluster().client(), DEFAULT_NAMESPACE)
}

#[tokio::test(flavor = "multi_thread")]
async fn gateway_node_without_a_ready_agent_is_replaced() {
    run(test_name!(), async |fixture| {
        fixture.put_two_pools().await?;
        for node in ["c-a", "x-a", "x-b"] {
            put_agent(fixture, node, true).await?;
        }
        let gateway_node = json!({
            "apiVersion": "raven.openyurt.io/v1beta1", "kind": "GatewayNode", "metadata": {"name": "x-b"}, "spec": {"gateway": "site", "version": "1"},
        });
        let mut reported = gateway_node.clone();
        let condition = |type_: &str| json!({"type": type_, "status": "True", "reason": "Forwarding", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"});
        reported["status"] = json!({"conditions": [condition("Ready"), condition("TunnelConnected")]});
        let gateway_nodes: Api<GatewayNode> = Api::all(fixture.lab.cluster().client());
        let agent = PatchParams::apply("an-agent");
        gateway_nodes.patch("x-b", &agent, &Patch::Apply(&gateway_node)).await?;
        gateway_nodes.patch_status("x-b", &agent, &Patch::Apply(&reported)).await?;
        let _controller = fixture.controller("one", &["--agent-timeout=2s"]).await?;
        fixture.two_pools_are_ready().await?;
        elects(&fixture.gateways.get("site").await?, &["x-b"])?;

        // The image cannot be pulled, for example.
        put_agent(fixture, "x-b", false).await?;
        fixture.until("site", "elects the node that has an agent", |g| elects(g, &["x-a"])).await?;
        let note = "x-a replaces x-b (its agent is not Ready: kubectl describe pods -A -l app.kubernetes.io/name=raven-agent --field-selector spec.nodeName=x-b)";
        fixture.event("site", "GatewayNodeReplaced", note).await?;

        let conditions = || {
            let path = "--output=jsonpath={range .status.conditions[*]}{.type}={.status} {.reason};{end}";
            fixture.lab.cluster().kubectl(&["get", "gatewaynode", "x-b", path])
        };
        eventually(SOON, "the GatewayNode of x-b is not Ready", async || {
            ensure!(conditions()? == "Ready=Unknown AgentNotReady;", "{}", conditions()?);
            Ok(())
        })
        .await?;

        // The other node has no Pod at all: the elected node stays, and the Gateway is not Ready.
        agents(fixture).delete("raven-agent-x-a", &DeleteParams::default().grace_period(0)).await?;
        let dark = |g: &_| has_condition(g, "Ready", "False", "AgentNotReady", "the agent of gateway node x-a is not Ready");
        fixture.until("site", "is not Ready", dark).await?;
        elects(&fixture.gateways.get("site").await?, &["x-a"])?;

        put_agent(fixture, "x-b", true).await?;
        fixture.until("site", "elects the node whose agent works again", |g| elects(g, &["x-b"])).await?;
        fixture.two_pools_are_ready().await
    })
    .await;
}
