"""Client of editserver: an OpenAI-compatible server whose requests may edit and read the residual stream.

from editserver_client import AddFeature, Client, EditFeatures, Inspect

client = Client("http://localhost:8000")
answer = client.chat(
    "Tell me about Paris.",
    interventions=[EditFeatures("smollm2-135m/l15", [AddFeature(1234, 8)])],
    inspect=Inspect("smollm2-135m/l15", top_k=5),
)
print(answer.text, answer.receipt, answer.readings)
"""

from __future__ import annotations

from ._version import __version__
from .async_client import AsyncClient
from .body import extra_body
from .catalogue import (
    Activations,
    Artifact,
    CalibrationPoint,
    Capabilities,
    Contrast,
    ContrastFeature,
    FeatureCard,
    FeatureContext,
    FeatureInfo,
    Neighbour,
    SAEInfo,
    StrengthCalibration,
    Tokenization,
    TokenWeight,
    Vector,
)
from .client import Client
from .events import (
    ActionEvent,
    Event,
    FinishEvent,
    InspectionEvent,
    ReasoningDelta,
    ReceiptEvent,
    RuleEvent,
    TextDelta,
    ToolCallDelta,
    UsageEvent,
)
from .exceptions import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    BadRequest,
    EditserverError,
    ErrorCode,
    Forbidden,
    InterventionFailed,
    JobFailed,
    NotFound,
    RateLimited,
    RuleError,
    ServerError,
    StreamError,
    Unauthorized,
    UnexpectedResponse,
)
from .features import AblateFeature, AddFeature, ClampFeature, FeatureEdit, ScaleFeature, SetFeature
from .handles import AsyncJob, AsyncJobs, Job, Jobs
from .inspection import FeatureReading, Inspect, Inspection, TokenReading, TokenRules
from .interventions import EditFeatures, InlineConcept, Intervention, Remap, Steer, Suppress
from .jobs import ConceptFit, JobStatus, Progress
from .receipts import Application, GateFacts, Receipt, ReceiptEntry, RuleReceipt
from .responses import (
    ChatChoice,
    ChatResponse,
    CompletionChoice,
    CompletionResponse,
    FunctionCall,
    Message,
    ToolCall,
    Usage,
)
from .rules import ActionFacts, Firing, NormalForm, Proof, PropositionFacts, Reason, Rules, WhenFacts
from .selectors import Selector, Slice, Tokens, TokenSet
from .streams import AsyncChatStream, AsyncCompletionStream, AsyncStream, ChatStream, CompletionStream, Stream
from .tensors import PackedTensor, pack
from .transcript import StreamedChoice

__all__ = [
    "APIConnectionError",
    "APIStatusError",
    "APITimeoutError",
    "AblateFeature",
    "ActionEvent",
    "ActionFacts",
    "Activations",
    "AddFeature",
    "Application",
    "Artifact",
    "AsyncChatStream",
    "AsyncClient",
    "AsyncCompletionStream",
    "AsyncJob",
    "AsyncJobs",
    "AsyncStream",
    "BadRequest",
    "CalibrationPoint",
    "Capabilities",
    "ChatChoice",
    "ChatResponse",
    "ChatStream",
    "ClampFeature",
    "Client",
    "CompletionChoice",
    "CompletionResponse",
    "CompletionStream",
    "ConceptFit",
    "Contrast",
    "ContrastFeature",
    "EditFeatures",
    "EditserverError",
    "ErrorCode",
    "Event",
    "FeatureCard",
    "FeatureContext",
    "FeatureEdit",
    "FeatureInfo",
    "FeatureReading",
    "FinishEvent",
    "Firing",
    "Forbidden",
    "FunctionCall",
    "GateFacts",
    "InlineConcept",
    "Inspect",
    "Inspection",
    "InspectionEvent",
    "Intervention",
    "InterventionFailed",
    "Job",
    "JobFailed",
    "JobStatus",
    "Jobs",
    "Message",
    "Neighbour",
    "NormalForm",
    "NotFound",
    "PackedTensor",
    "Progress",
    "Proof",
    "PropositionFacts",
    "RateLimited",
    "Reason",
    "ReasoningDelta",
    "Receipt",
    "ReceiptEntry",
    "ReceiptEvent",
    "Remap",
    "RuleError",
    "RuleEvent",
    "RuleReceipt",
    "Rules",
    "SAEInfo",
    "ScaleFeature",
    "Selector",
    "ServerError",
    "SetFeature",
    "Slice",
    "Steer",
    "Stream",
    "StreamError",
    "StreamedChoice",
    "StrengthCalibration",
    "Suppress",
    "TextDelta",
    "TokenReading",
    "TokenRules",
    "TokenSet",
    "TokenWeight",
    "Tokenization",
    "Tokens",
    "ToolCall",
    "ToolCallDelta",
    "Unauthorized",
    "UnexpectedResponse",
    "Usage",
    "UsageEvent",
    "Vector",
    "WhenFacts",
    "__version__",
    "extra_body",
    "pack",
]
