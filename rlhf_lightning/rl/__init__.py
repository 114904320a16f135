"""Reinforcement learning: on-policy rollouts, their rewards and advantages, and what GRPO and PPO share."""
