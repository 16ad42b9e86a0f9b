//! Identities of agents and controller: service accounts with tokens from the TokenRequest API, an agent's bound to a
//! Pod on its node. Every test thus runs with the real RBAC rules and admission policy.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use k8s_openapi::api::admissionregistration::v1::ValidatingAdmissionPolicyBinding;
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Pod, ServiceAccount};
use kube::Client;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use raven_api::{AGENT_SERVICE_ACCOUNT, DEFAULT_NAMESPACE, GatewayNode};
use serde_json::json;

use super::Cluster;
use crate::eventually;
use crate::site::{API_PORT, Node, Site};

/// Name of the controller's service account.
pub const CONTROLLER_SERVICE_ACCOUNT: &str = "raven-controller";
const SOON: Duration = Duration::from_secs(30);
/// Lifetime of tokens, longer than that of any lab.
const TOKEN_SECONDS: i64 = 7 * 24 * 3600;

/// Waits until the API server enforces the admission policy, if one is installed: there is a delay after it is stored.
/// Tests this with a dry run of a forbidden write, by an agent without a node's token.
pub(super) async fn policy_in_force(cluster: &Cluster) -> Result<()> {
    let bindings: Api<ValidatingAdmissionPolicyBinding> = Api::all(cluster.client());
    if bindings.list(&ListParams::default()).await?.items.is_empty() {
        return Ok(());
    }
    let mut config = super::config(&cluster.kubeconfig).await?;
    let agent = format!("system:serviceaccount:{DEFAULT_NAMESPACE}:{AGENT_SERVICE_ACCOUNT}");
    config.auth_info.impersonate = Some(agent);
    let api: Api<GatewayNode> = Api::all(Client::try_from(config)?);
    let object = json!({
        "apiVersion": "raven.openyurt.io/v1beta1",
        "kind": "GatewayNode",
        "metadata": {"name": "raven-lab-dry-run"},
        "spec": {},
    });
    eventually(SOON, "the admission policy is in force", async || {
        let parameters = PatchParams::apply("raven-lab").dry_run();
        match api.patch("raven-lab-dry-run", &parameters, &Patch::Apply(&object)).await {
            Ok(_) => bail!("an agent without a node was allowed to write a GatewayNode"),
            Err(error) if error.to_string().contains("ValidatingAdmissionPolicy") => Ok(()),
            Err(error) => Err(error.into()),
        }
    })
    .await
}

impl Cluster {
    /// Writes the kubeconfig of a node's agent: a token bound to its Pod, and the API server's address as
    /// seen from the node.
    pub async fn agent_kubeconfig(&self, site: &Site, node: &Node) -> Result<PathBuf> {
        let pod = self.agent_pod(node).await?;
        let token = self.token(AGENT_SERVICE_ACCOUNT, Some(&pod)).await?;
        let path = node.dir.join("kubeconfig");
        fs::write(&path, self.certificates.token_kubeconfig(&self.server_for(site, node), &token))?;
        Ok(path)
    }

    /// Writes the controller's kubeconfig and returns its path.
    pub async fn controller_kubeconfig(&self, site: &Site) -> Result<PathBuf> {
        let token = self.token(CONTROLLER_SERVICE_ACCOUNT, None).await?;
        let path = site.dir.join("controller.kubeconfig");
        let server = format!("https://{}:{API_PORT}", site.host_link.control_plane);
        fs::write(&path, self.certificates.token_kubeconfig(&server, &token))?;
        Ok(path)
    }

    /// Returns the Pod of a node's agent; creates it as the DaemonSet would.
    async fn agent_pod(&self, node: &Node) -> Result<Pod> {
        let name = format!("raven-agent-{}", node.name);
        let api: Api<Pod> = Api::namespaced(self.client(), DEFAULT_NAMESPACE);
        if let Some(pod) = api.get_opt(&name).await? {
            return Ok(pod);
        }
        let pod = serde_json::from_value(json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": DEFAULT_NAMESPACE},
            "spec": {
                "nodeName": node.name,
                "serviceAccountName": AGENT_SERVICE_ACCOUNT,
                "hostNetwork": true,
                "tolerations": [{"operator": "Exists"}],
                "containers": [{"name": "raven-agent", "image": "raven-agent:lab"}],
            },
        }))?;
        api.create(&PostParams::default(), &pod).await.with_context(|| format!("create Pod {name}"))
    }

    /// Deletes the Pod of a node's agent, which revokes the agent's token.
    pub async fn delete_agent_pod(&self, node: &str) -> Result<()> {
        let api: Api<Pod> = Api::namespaced(self.client(), DEFAULT_NAMESPACE);
        let now = DeleteParams::default().grace_period(0);
        api.delete(&format!("raven-agent-{node}"), &now).await?;
        Ok(())
    }

    async fn token(&self, account: &str, pod: Option<&Pod>) -> Result<String> {
        let bound = pod.map(|pod| BoundObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            name: pod.metadata.name.clone(),
            uid: pod.metadata.uid.clone(),
        });
        let request = TokenRequest {
            spec: TokenRequestSpec {
                bound_object_ref: bound,
                expiration_seconds: Some(TOKEN_SECONDS),
                ..TokenRequestSpec::default()
            },
            ..TokenRequest::default()
        };
        let api: Api<ServiceAccount> = Api::namespaced(self.client(), DEFAULT_NAMESPACE);
        let answer = api.create_token_request(account, &PostParams::default(), &request).await;
        let answer = answer.with_context(|| format!("request a token for {account}"))?;
        Ok(answer.status.context("the API server returned no token")?.token)
    }
}
