"""Reinforcement learning: on-policy rollouts, their rewards and advantages, and the base class of GRPO and PPO."""
