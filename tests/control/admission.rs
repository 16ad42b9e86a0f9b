//! Tests of the admission policies: an agent can write only its own GatewayNode, identified by the token of its Pod, and
//! a kubelet cannot move its Node into another pool.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Node;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};
use raven_api::{AGENT_SERVICE_ACCOUNT, Gateway, GatewayNode};
use raven_tests::{PoolSpec, test_name};
use serde_json::{Value, json};

use crate::fixture::{Fixture, run_with_pools};

#[tokio::test(flavor = "multi_thread")]
async fn agent_can_write_only_its_own_gateway_node() {
    let pools = vec![PoolSpec { nodes: vec!["c-a".into(), "c-b".into()], ..PoolSpec::new("cloud", "cloud", 0, 10) }];
    run_with_pools(pools, test_name!(), async |fixture| {
        let (a, b) = (agent(fixture, "c-a").await?, agent(fixture, "c-b").await?);
        let of = |client: &Client| Api::<GatewayNode>::all(client.clone());

        // All writes of the agent's own GatewayNode are allowed.
        of(&a).create(&PostParams::default(), &serde_json::from_value(object("c-a"))?).await?;
        apply(&of(&a), "c-a").await?;
        apply_status(&of(&a), "c-a").await?;
        of(&a).delete("c-a", &DeleteParams::default()).await?;
        apply(&of(&a), "c-a").await?;
        apply(&of(&b), "c-b").await?;

        // All writes of another node's GatewayNode are denied with a message.
        let denied_for_c_a = "the agent on node c-b may write GatewayNode c-b only, not c-a";
        ensure_denied(
            of(&b).create(&PostParams::default(), &serde_json::from_value(object("c-x"))?).await,
            "may write GatewayNode c-b only, not c-x",
        )?;
        ensure_denied(apply(&of(&b), "c-a").await, denied_for_c_a)?;
        ensure_denied(
            of(&b).patch("c-a", &PatchParams::default(), &Patch::Merge(json!({"spec": {"publicKey": null}}))).await,
            denied_for_c_a,
        )?;
        let mut stolen = of(&b).get("c-a").await?;
        stolen.spec.gateway = "mine".to_owned();
        ensure_denied(of(&b).replace("c-a", &PostParams::default(), &stolen).await, denied_for_c_a)?;
        ensure_denied(apply_status(&of(&b), "c-a").await, denied_for_c_a)?;
        ensure_denied(of(&b).delete("c-a", &DeleteParams::default()).await, denied_for_c_a)?;
        assert_eq!(of(&a).get("c-a").await?.spec.gateway, "cloud");
        // A generated name belongs to no node.
        let mut nameless = object("");
        nameless["metadata"] = json!({"generateName": "c-b"});
        let nameless = serde_json::from_value(nameless)?;
        ensure_denied(of(&b).create(&PostParams::default(), &nameless).await, "may write GatewayNode c-b only")?;
        // RBAC does not grant deletecollection.
        ensure_denied(of(&b).delete_collection(&DeleteParams::default(), &Default::default()).await, "forbidden")?;

        // With a token that is bound to no node, an agent cannot write any GatewayNode.
        let unbound = token(fixture, &["create", "token", AGENT_SERVICE_ACCOUNT, "-n", "kube-system"]).await?;
        ensure_denied(apply(&of(&unbound), "c-a").await, "this token is not bound to a node")?;
        ensure_denied(apply(&of(&unbound), "c-z").await, "this token is not bound to a node")?;

        // Gateways and other resources are read-only or inaccessible.
        fixture.put_gateway("cloud", json!({})).await?;
        let gateways: Api<Gateway> = Api::all(b.clone());
        gateways.get("cloud").await?;
        let spec = Patch::Merge(json!({"spec": {"exposeType": "PublicIP"}}));
        ensure_denied(gateways.patch("cloud", &PatchParams::default(), &spec).await, "forbidden")?;
        let status = Patch::Merge(json!({"status": {"nodes": []}}));
        ensure_denied(gateways.patch_status("cloud", &PatchParams::default(), &status).await, "forbidden")?;
        ensure_denied(
            gateways.create(&PostParams::default(), &Gateway::new("mine", Default::default())).await,
            "forbidden",
        )?;
        ensure_denied(gateways.delete("cloud", &DeleteParams::default()).await, "forbidden")?;
        let account = format!("--as=system:serviceaccount:kube-system:{AGENT_SERVICE_ACCOUNT}");
        for (verb, what) in [
            ("get", "secrets"),
            ("list", "nodes"),
            ("patch", "nodes"),
            ("list", "pods"),
            ("update", "leases.coordination.k8s.io"),
        ] {
            // kubectl exits with status 1 for "no".
            let answer = fixture.lab.cluster().kubectl(&["auth", "can-i", verb, what, "-n", "kube-system", &account]);
            ensure!(answer.is_err(), "an agent may {verb} {what}");
        }

        // Deleting the Pod revokes its token.
        fixture.lab.cluster().delete_agent_pod("c-b").await?;
        raven_tests::eventually(crate::fixture::SOON, "the token of a deleted Pod is revoked", async || {
            let Err(error) = apply(&of(&b), "c-b").await else { anyhow::bail!("the write was allowed") };
            ensure!(matches!(&error, kube::Error::Api(status) if status.code == 401), "{error:?}");
            Ok(())
        })
        .await
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kubelet_cannot_move_its_node_into_another_pool() {
    let pools = vec![PoolSpec { nodes: vec!["c-a".into()], ..PoolSpec::new("cloud", "cloud", 0, 10) }];
    run_with_pools(pools, test_name!(), async |fixture| {
        // The lab's API server has no Node authorizer, so its role is bound as in old clusters.
        fixture.lab.cluster().kubectl(&[
            "create",
            "clusterrolebinding",
            "kubelets",
            "--clusterrole=system:node",
            "--group=system:nodes",
        ])?;
        let mut config = Config::from_custom_kubeconfig(
            Kubeconfig::read_from(fixture.lab.cluster().kubeconfig())?,
            &KubeConfigOptions::default(),
        )
        .await?;
        config.auth_info.impersonate = Some("system:node:c-a".to_owned());
        config.auth_info.impersonate_groups = Some(vec!["system:nodes".to_owned()]);
        let kubelet: Api<Node> = Api::all(Client::try_from(config)?);
        let admin: Api<Node> = Api::all(fixture.lab.cluster().client());
        let merge = PatchParams::default();
        let labels = |name: &str, value: Value| Patch::Merge(json!({"metadata": {"labels": {name: value}}}));

        // The binding and the policy come into force after a delay.
        raven_tests::eventually(crate::fixture::SOON, "the kubelet may write its Node", async || {
            Ok(kubelet.patch("c-a", &merge, &labels("example.com/rack", json!("7"))).await.map(drop)?)
        })
        .await?;
        let probe = PatchParams { dry_run: true, ..PatchParams::default() };
        raven_tests::eventually(crate::fixture::SOON, "the policy is in force", async || {
            let forbidden = labels("apps.openyurt.io/nodepool", json!("probe"));
            ensure_denied(kubelet.patch("c-a", &probe, &forbidden).await, "assign its node to a pool")
        })
        .await?;
        for name in [
            "raven.openyurt.io/gateway",
            "openyurt.io/is-edge-worker",
            "apps.openyurt.io/nodepool",
            "apps.openyurt.io/desired-nodepool",
        ] {
            let denied = format!("may not change labels that assign its node to a pool: {name}");
            admin.patch("c-a", &merge, &labels(name, Value::Null)).await?;
            ensure_denied(kubelet.patch("c-a", &merge, &labels(name, json!("other"))).await, &denied)?;
            ensure_denied(kubelet.patch_status("c-a", &merge, &labels(name, json!("other"))).await, &denied)?;
            admin.patch("c-a", &merge, &labels(name, json!("own"))).await?;
            ensure_denied(kubelet.patch("c-a", &merge, &labels(name, json!("other"))).await, &denied)?;
            ensure_denied(kubelet.patch_status("c-a", &merge, &labels(name, Value::Null)).await, &denied)?;
            // The same value is no change.
            kubelet.patch("c-a", &merge, &labels(name, json!("own"))).await?;
        }
        let ready =
            json!({"status": {"conditions": [{"type": "Ready", "status": "True", "reason": "r", "message": "m"}]}});
        kubelet.patch_status("c-a", &merge, &Patch::Strategic(ready)).await?;

        // The policy that docs/security.md recommends after a theft.
        let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/security.md"))?;
        let policy = page.split("POLICY").nth(1).context("docs/security.md has no policy")?;
        let path = fixture.lab.dir.join("policy.yaml");
        std::fs::write(&path, policy.trim_start_matches('\''))?;
        fixture.lab.cluster().kubectl(&["apply", "-f", path.to_str().context("a path in UTF-8")?])?;
        let node = |name: &str| serde_json::from_value(json!({"metadata": {"name": name}}));
        let dry = PostParams { dry_run: true, ..PostParams::default() };
        raven_tests::eventually(crate::fixture::SOON, "the stolen machine cannot register", async || {
            ensure_denied(admin.create(&dry, &node("edge-7")?).await, "this machine was stolen")
        })
        .await?;
        admin.create(&dry, &node("edge-8")?).await?;
        Ok(())
    })
    .await;
}

fn object(name: &str) -> Value {
    let key = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
    json!({"apiVersion": "raven.openyurt.io/v1beta1", "kind": "GatewayNode", "metadata": {"name": name}, "spec": {"gateway": "cloud", "publicKey": key}})
}

async fn apply(api: &Api<GatewayNode>, name: &str) -> kube::Result<GatewayNode> {
    api.patch(name, &PatchParams::apply("raven-agent").force(), &Patch::Apply(object(name))).await
}

async fn apply_status(api: &Api<GatewayNode>, name: &str) -> kube::Result<GatewayNode> {
    let status = json!({"apiVersion": "raven.openyurt.io/v1beta1", "kind": "GatewayNode", "metadata": {"name": name}, "status": {"dataplaneTier": "tc"}});
    api.patch_status(name, &PatchParams::apply("raven-agent").force(), &Patch::Apply(status)).await
}

fn ensure_denied<T>(result: kube::Result<T>, words: &str) -> Result<()> {
    match result {
        Ok(_) => anyhow::bail!("the request was allowed; expected an error with {words:?}"),
        Err(kube::Error::Api(status)) if status.code == 403 && status.message.contains(words) => Ok(()),
        Err(error) => anyhow::bail!("expected an error with {words:?}, got {error:?}"),
    }
}

async fn agent(fixture: &Fixture, node: &str) -> Result<Client> {
    let node = fixture.lab.node(node);
    let path = fixture.lab.cluster().agent_kubeconfig(&fixture.lab, node).await?;
    client(fixture, &path).await
}

// The agent's identity, with the address by which this test reaches the API server.
async fn client(fixture: &Fixture, path: &Path) -> Result<Client> {
    let config = |file| async move { Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await };
    let mut agent = config(Kubeconfig::read_from(path)?).await?;
    agent.cluster_url = config(Kubeconfig::read_from(fixture.lab.cluster().kubeconfig())?).await?.cluster_url;
    Ok(Client::try_from(agent)?)
}

async fn token(fixture: &Fixture, args: &[&str]) -> Result<Client> {
    let mut config = Config::from_custom_kubeconfig(
        Kubeconfig::read_from(fixture.lab.cluster().kubeconfig())?,
        &KubeConfigOptions::default(),
    )
    .await?;
    let token = fixture.lab.cluster().kubectl(args)?.trim().to_owned();
    config.auth_info = kube::config::AuthInfo { token: Some(token.into()), ..Default::default() };
    Ok(Client::try_from(config)?)
}
